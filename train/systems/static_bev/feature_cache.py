"""What the frozen part of a network makes of every moment, computed once: a memory-mapped file beside its index."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...files import write_whole


class FeatureCache:
    """Features (C, h, w) in bfloat16 and where a sensor saw the ground, by sample token and variant.

    A reader maps the file, so workers share it and only what is read is in memory.

    Args:
        index: the file that `create` wrote when all was there.
        key: what the content has to follow from.

    Raises:
        ValueError: it is of another key.
    """

    def __init__(self, index: Path, key: dict):
        content = json.loads(index.read_text())
        if content["key"] != _plain(key):
            raise ValueError(f"{index} is of other weights, data or settings")
        self.variants = content["shape"][1]
        self._places = {token: place for place, token in enumerate(content["tokens"])}
        self._features = np.load(index.with_suffix(".features.npy"), mmap_mode="r")
        self._seen = np.load(index.with_suffix(".seen.npy"), mmap_mode="r")

    def read(self, token: str, variant: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, h, w) bfloat16 and (1, h, w) uint8."""
        place = self._places[token]
        features = torch.from_numpy(np.array(self._features[place, variant])).view(torch.bfloat16)
        return features, torch.from_numpy(np.array(self._seen[place, variant]))[None]


def cache_path(folder: str | Path, key: dict) -> Path:
    """The index of the cache of a key."""
    name = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.json"


def open_arrays(index: Path, shape: Sequence[int], create: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two files that are filled: features (N, variants, C, h, w) as the bits of bfloat16, and seen without C."""
    if create:
        index.parent.mkdir(parents=True, exist_ok=True)
    whole, flat = tuple(shape), (*shape[:2], *shape[3:])
    kinds = ((".features.npy", np.uint16, whole), (".seen.npy", np.uint8, flat))
    options = (lambda kind, size: dict(mode="w+", dtype=kind, shape=size)) if create else lambda *_: dict(mode="r+")
    return tuple(np.lib.format.open_memmap(index.with_suffix(end), **options(kind, size)) for end, kind, size in kinds)


def write_row(arrays: tuple[np.ndarray, np.ndarray], place: int, variant: int, features, seen) -> None:
    """One moment: features (C, h, w) and seen (1, h, w)."""
    arrays[0][place, variant] = features.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    arrays[1][place, variant] = seen[0].to(torch.uint8).cpu().numpy()


def finish(index: Path, key: dict, tokens: Sequence[str], shape: Sequence[int]) -> None:
    """Writes the index, last: without it the files count for nothing."""
    content = dict(key=_plain(key), tokens=list(tokens), shape=list(shape))
    write_whole(index, json.dumps(content, indent=1) + "\n")


def _plain(key):
    return json.loads(json.dumps(key))
