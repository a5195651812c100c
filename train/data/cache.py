"""A cache of arrays by sample, without pickles: one npz for a split, and a JSON index that vouches for it."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

_FORMAT = 1  # of the files, and of the rules that made what is in them: part of every key
_BLOCK = 1 << 20


class ArrayCache(Mapping):
    """Sample token → name → array; see `write_cache` and `open_cache`. Everything is in memory, read-only and shared by
    forked workers."""

    def __init__(self, tokens: list[str], arrays: Mapping[str, np.ndarray]):
        self._places = {token: place for place, token in enumerate(tokens)}
        self._names = [name.removesuffix("/ends") for name in arrays if name.endswith("/ends")]
        self._arrays = dict(arrays)
        for array in self._arrays.values():
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, token: str) -> dict[str, np.ndarray]:
        place, result = self._places[token], {}
        for name in self._names:
            ends = self._arrays[f"{name}/ends"]
            result[name] = self._arrays[f"{name}/rows"][ends[place - 1] if place else 0 : ends[place]]
        return result


def tables_digest(root: str | Path, version: str | None = None) -> str:
    """Returns the sha256 over the tables of a version (None = of all there are) and the map expansions of a nuScenes
    root, their names included."""
    root, digest = Path(root), hashlib.sha256()
    folders = [path.parent for path in root.glob(f"{version or '*'}/sample_data.json")] + [root / "maps" / "expansion"]
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        _feed(digest, path)
    return digest.hexdigest()


def write_cache(
    folder: str | Path, split: str, key: Mapping, samples: Iterable[tuple[str, Mapping[str, np.ndarray]]]
) -> Path:
    """Writes the cache of one split and returns its index file. A reader sees the old state or the new one.

    Args:
        folder: where caches lie; many splits and keys share it.
        split: its name.
        key: what the content follows from, such as settings and `tables_digest`; anything that JSON can hold.
        samples: (token, arrays) each; every sample has the same names, and arrays of one name have the same type and
            shape but for the first axis, whose length is free.

    Raises:
        ValueError: no sample, a token twice, or names, types or shapes that differ.
    """
    tokens, columns = [], {}
    for token, arrays in samples:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if tokens and arrays.keys() != columns.keys():
            raise ValueError(f"sample {token} has {sorted(arrays)}, the others have {sorted(columns)}")
        tokens.append(token)
        for name, array in arrays.items():
            columns.setdefault(name, []).append(array)
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"split {split!r} has {len(tokens)} samples, {len(set(tokens))} of them different")
    packed = {}
    for name, column in columns.items():
        kinds = {(array.dtype.str, array.shape[1:]) for array in column if array.ndim}
        if len(kinds) != 1 or not all(array.ndim for array in column) or column[0].dtype.hasobject:
            raise ValueError(
                f"arrays {name!r} differ in type or shape, or are no arrays of numbers: {sorted(kinds)[:3]}"
            )
        packed[f"{name}/rows"], packed[f"{name}/ends"] = np.concatenate(column), np.cumsum([len(x) for x in column])
    data, index = _files(folder, split, key)
    data.parent.mkdir(parents=True, exist_ok=True)
    _write(data, lambda file: np.savez(file, **packed))
    content = {"format": _FORMAT, "split": split, "key": key, "sha256": _sha256(data), "tokens": tokens}
    _write(index, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return index


def open_cache(folder: str | Path, split: str, key: Mapping) -> ArrayCache:
    """Opens the cache that `write_cache` wrote for this split and key.

    Raises:
        FileNotFoundError: there is none; caches of other keys do not count.
        ValueError: it is damaged.
    """
    data, index = _files(folder, split, key)
    if not index.is_file() or not data.is_file():
        raise FileNotFoundError(f"no cache of split {split!r} for these settings and tables: {index}")
    try:
        content = json.loads(index.read_text())
        if content["sha256"] != _sha256(data):
            raise ValueError("its sha256 is not what the index says")
        with np.load(data, allow_pickle=False) as file:
            return ArrayCache(content["tokens"], {name: file[name] for name in file.files})
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{data} is damaged ({error}); delete it and make it again") from error


def cache_index(folder: str | Path, split: str, key: Mapping) -> Path:
    """Where the index of a cache is, or would be; the npz beside it has the same stem."""
    return _files(folder, split, key)[1]


def _files(folder, split, key):
    text = json.dumps([_FORMAT, split, key], sort_keys=True)
    stem = f"{split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Path(folder) / f"{stem}.npz", Path(folder) / f"{stem}.json"


def _write(path, write):
    """Under another name first: a crash leaves no half file under this one."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _sha256(path):
    digest = hashlib.sha256()
    _feed(digest, path)
    return digest.hexdigest()


def _feed(digest, path):
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
