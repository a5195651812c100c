"""Checkpoints that are whole or absent, checked when they are read, and never run code.

step-00000120.pt          what `torch.save` wrote: plain containers and tensors
step-00000120.pt.sha256   its digest, as `sha256sum -c` reads it
last.pt, best.pt          links to one of them

A checkpoint has at least `model` (name → tensor: the weights to evaluate and to go on from), `counters` (with `step`)
and `config` (with `name`).
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .files import TEMPORARY, write_whole


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message says why, and names another that can."""


def save(folder: str | Path, step: int, state: dict, keep: int, branched_at: int | None = None) -> Path:
    """Writes `step-<step>.pt`, lets `last.pt` point to it, and deletes all but the newest `keep` and the best.

    A crash at any point leaves every earlier checkpoint as it was, and one of the same step as it was or new.

    Args:
        folder: made where it does not exist.
        step: of the run.
        state: plain containers and tensors.
        keep: how many to leave.
        branched_at: the step from which the run went on when this is its first checkpoint since: later ones that are
            there belong to a branch that was abandoned, and go.

    Raises:
        CheckpointError: a tensor holds NaN or an infinity; nothing is written then. OSError: it cannot be written.
    """
    broken = next((name for name, tensor in _tensors(state) if not tensor.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(f"step {step} is not saved: {broken} has values that are not finite")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink()
    path = path_of(folder, step)
    writing = path.with_name(path.name + TEMPORARY)
    try:
        with open(writing, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        line = f"{digest(writing)}  {path.name}\n".encode()
        # Both digests are good while either file may be there, so that no moment is without a checkpoint.
        before = _digest_path(path)
        write_whole(before, line + (before.read_bytes() if path.exists() and before.exists() else b""))
        os.replace(writing, path)
    except OSError:
        writing.unlink(missing_ok=True)  # a full disk needs the room
        raise
    _sync_folder(folder)
    write_whole(_digest_path(path), line)
    link(path, "last")
    _prune(folder, path, keep, branched_at)
    return path


def _prune(folder, newest, keep, branched_at):
    best = folder / "best.pt"
    spared = {newest.name, os.readlink(best) if best.is_symlink() else ""}
    there = checkpoints(folder)
    abandoned = [path for path in there if branched_at is not None and _step(path) > branched_at and path != newest]
    ours = [path for path in there if path not in abandoned]
    for old in abandoned + ours[keep:]:
        if old.name not in spared:
            old.unlink()
    for digest in folder.glob("step-*.pt.sha256"):  # those just pruned, and what a killed run left
        if not digest.with_suffix("").exists():
            digest.unlink()


def link(path: Path, name: str) -> None:
    """Lets `<name>.pt` point to a checkpoint of the same folder, at once."""
    temporary = path.with_name(f"{name}.pt{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.with_name(f"{name}.pt"))
    _sync_folder(path.parent)


def go_back(folder: str | Path, step: int, best_step: int | None) -> None:
    """Lets `last.pt` and `best.pt` point to what they were at a step; None = there was no best.

    So whoever asks for the newest gets the branch that begins here, and not the one that was left.
    """
    link(path_of(folder, step), "last")
    if best_step is None:
        (Path(folder) / "best.pt").unlink(missing_ok=True)
    else:
        link(path_of(folder, best_step), "best")


def path_of(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}.pt"


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, the highest step first."""
    found = (path for path in Path(folder).glob("step-*.pt") if path.stem.removeprefix("step-").isdigit())
    return sorted(found, key=_step, reverse=True)


def newest(folder: str | Path) -> Path | None:
    """What `last.pt` points to: the newest of the branch that was trained last. None where there is no checkpoint."""
    last = Path(folder) / "last.pt"
    if last.exists():
        return last.resolve()
    return next(iter(checkpoints(folder)), None)


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU.

    Raises:
        CheckpointError: it does not exist, is damaged, has no digest beside it, holds more than data, or is none of a
            run of this toolkit.
    """
    path, state = Path(path), None
    problem = _problem(path)
    if problem is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            problem = _no_checkpoint(state)
        except Exception as error:  # whatever a reader of foreign bytes may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"holds something other than tensors and plain values, so it is not loaded ({reason})"
    if problem is None:
        return state
    real = path.resolve()
    others = checkpoints(real.parent)
    if real in others:  # those before it are of the same branch
        place = others.index(real)
        others = others[place + 1 :] + others[:place]
    good = next((other for other in others if _problem(other) is None), None)
    raise CheckpointError(f"{path} {problem}; " + (f"the newest good one is {good}" if good else "there is no other"))


def _problem(path: Path) -> str | None:
    if not path.is_file():
        return "does not exist"
    real = path.resolve()
    recorded = _digest_path(real)
    if not recorded.is_file():
        return f"has no {recorded.name} beside it, so it cannot be checked; copy that too"
    try:
        digests = [line.split()[0] for line in recorded.read_bytes().splitlines() if line.strip()]
        if digest(real).encode() not in digests:
            return "is damaged: its sha256 is not the recorded one"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _no_checkpoint(state) -> str | None:
    """Why what was loaded is no checkpoint; None where it is one."""
    parts = state if isinstance(state, dict) else {}
    model, counters, config = (parts.get(name) for name in ("model", "counters", "config"))
    lacking = []
    if not (isinstance(model, dict) and all(isinstance(value, torch.Tensor) for value in model.values())):
        lacking.append("model (tensors by name)")
    if not (isinstance(counters, dict) and type(counters.get("step")) is int):
        lacking.append("counters (with step)")
    if not (isinstance(config, dict) and isinstance(config.get("name"), str)):
        lacking.append("config (with name)")
    return f"is no checkpoint of a run: it lacks {', '.join(lacking)}" if lacking else None


def _tensors(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor in nested containers, with its path."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def digest(path: str | Path) -> str:
    """The sha256 of a file's content."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            result.update(chunk)
    return result.hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source) -> None:
    """`load_state_dict` with one line of error: CheckpointError names the first parameters that do not fit."""
    own = model.state_dict()
    wrong = [f"lacks {name}" for name in own if name not in weights]
    wrong += [f"has {name}, the model does not" for name in weights if name not in own]
    common = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    wrong += [f"has {name} as {tuple(weights[name].shape)}, needs {tuple(own[name].shape)}" for name in common]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source} does not fit the model: it {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(weights)


def take_weights(model: nn.Module, path: str | Path) -> str:
    """Gives the model the weights of another run's checkpoint where names and shapes agree; says what it took."""
    there, own = load(path)["model"], model.state_dict()
    fitting = {name: value for name, value in there.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise CheckpointError(f"{path} has no weight that fits the model")
    model.load_state_dict(fitting, strict=False)
    parts = sorted({name.split(".")[0] for name in own if name not in fitting})
    rest = f"; not found there: some of {', '.join(parts)}" if parts else ""
    return f"began with {len(fitting)} of {len(own)} tensors from {path}{rest}"
