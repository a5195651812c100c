"""Checkpoints that are whole or absent, checked when they are read, and never run code.

step-00000120.pt          what `torch.save` wrote: plain containers and tensors
step-00000120.pt.sha256   its digest, as `sha256sum -c` reads it
last.pt, best.pt          links to one of them
"""

import hashlib
import os
import pickle
from pathlib import Path

import torch
from torch import nn

_TEMPORARY = ".writing"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message says why, and names another that can."""


def save(folder: str | Path, step: int, state: dict, keep: int) -> Path:
    """Writes `step-<step>.pt`, lets `last.pt` point to it, and deletes all but the newest `keep` and the best.

    A crash at any point leaves every earlier checkpoint as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{_TEMPORARY}"):
        leftover.unlink()
    path = folder / f"step-{step:08d}.pt"
    writing = path.with_name(path.name + _TEMPORARY)
    with open(writing, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.unlink(missing_ok=True)  # an old run's: it must not meet the new digest
    _write(_digest_path(path), f"{_sha256(writing)}  {path.name}\n")  # first, so that no checkpoint is without
    os.replace(writing, path)
    _sync_folder(folder)
    link(path, "last")
    best = folder / "best.pt"
    spared = {path.name, os.readlink(best) if best.is_symlink() else ""}
    for old in checkpoints(folder)[max(keep, 1) :]:
        if old.name not in spared:
            old.unlink()
            _digest_path(old).unlink(missing_ok=True)
    return path


def link(path: Path, name: str) -> None:
    """Lets `<name>.pt` point to a checkpoint of the same folder, at once."""
    temporary = path.with_name(f"{name}.pt{_TEMPORARY}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.with_name(f"{name}.pt"))
    _sync_folder(path.parent)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted(Path(folder).glob("step-*.pt"), reverse=True)


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU.

    Raises:
        CheckpointError: it does not exist, is damaged, has no digest beside it, or holds more than data.
    """
    path = Path(path)
    problem = _problem(path)
    if problem is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            problem = f"holds something other than tensors and plain values, so it is not loaded ({reason})"
    real = path.resolve()
    others = (other for other in checkpoints(real.parent) if other != real and _problem(other) is None)
    good = next(others, None)
    raise CheckpointError(f"{path} {problem}; " + (f"the newest good one is {good}" if good else "there is no other"))


def _problem(path: Path) -> str | None:
    if not path.is_file():
        return "does not exist"
    real = path.resolve()
    recorded = _digest_path(real)
    if not recorded.is_file():
        return f"has no {recorded.name} beside it, so it cannot be checked; copy that too"
    if recorded.read_text().split()[:1] != [_sha256(real)]:
        return "is damaged: its sha256 is not the recorded one"
    return None


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
