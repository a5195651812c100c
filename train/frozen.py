"""Judges by hashes of every tensor of a network whether what is frozen moved between two states of a run.

Frozen is what training would freeze with the settings in the checkpoint: parameters without gradient, and every buffer
but the statistics of batch norms that train. Compared are the sha256 of each tensor's bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .config import Experiment
from .optim import FreezeSchedule, parameter_groups, set_training
from .run import open_run, settings_of, without_weight_files

INITIAL = "initial"  # stands for the state that a run began with


@dataclass(frozen=True)
class State:
    """Weights and statistics at one step of a run; `config` as in the checkpoint."""

    source: str
    step: int
    weights: dict[str, torch.Tensor]
    config: dict


@dataclass(frozen=True)
class Finding:
    """One tensor in both states."""

    name: str
    parameters: int  # 0 for a buffer
    frozen: bool
    change: float  # largest absolute difference
    sha256: tuple[str, str]  # earlier, later

    @property
    def part(self) -> str:
        return self.name.split(".")[0]

    @property
    def moved(self) -> bool:
        return self.sha256[0] != self.sha256[1]


def frozen_names(model: nn.Module, settings: Experiment, step: int = 1) -> set[str]:
    """Names the tensors of the model's state that training with these settings leaves as they are up to a step."""
    parameter_groups(model, settings.optim)  # freezes what these freeze
    FreezeSchedule(model, settings.optim.freeze_until).apply(step - 1)
    set_training(model)
    moving = {
        f"{name}.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if module.training and getattr(module, "track_running_stats", False)
        for buffer, _ in module.named_buffers(recurse=False)
    }
    state = model.state_dict(keep_vars=True)
    return {name for name, tensor in state.items() if not tensor.requires_grad and name not in moving}


def sha256(tensor: torch.Tensor) -> str:
    """Hashes the bytes of the values in row-major order, whatever the memory format is."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def compare(earlier: State, later: State) -> list[Finding]:
    """Compares every tensor of the model that the settings of `later` build.

    Raises:
        ValueError: `earlier` is not earlier, or the settings are none of an experiment's.
        CheckpointError: a state does not fit the model.
    """
    if earlier.step >= later.step:
        steps = f"{earlier.source} is of step {earlier.step} and {later.source} of step {later.step}"
        raise ValueError(f"EARLIER: {steps}, needs an earlier one")
    settings = without_weight_files(settings_of(later.config))
    model = settings.build_model()
    for state in (earlier, later):
        checkpoint.load_weights(model, state.weights, state.source)
    frozen, findings = frozen_names(model, settings, later.step), []
    for name, tensor in model.state_dict(keep_vars=True).items():
        pair = earlier.weights[name], later.weights[name]
        findings.append(
            Finding(
                name,
                tensor.numel() if isinstance(tensor, nn.Parameter) else 0,
                name in frozen,
                (pair[1].double() - pair[0].double()).abs().max().item() if tensor.numel() else 0.0,
                tuple(map(sha256, pair)),
            )
        )
    return findings


def read(path: Path) -> State:
    """The state in a checkpoint; errors as those of `open_run`."""
    run = open_run(path)
    return State(str(path), run.step, run.state["model"], run.state["config"])


def initial(config: dict, weights: Path | None) -> State:
    """The state that a run with these settings begins with, drawn as the trainer draws it; `weights`: a checkpoint of
    another run that it was given."""
    settings = settings_of(config)
    torch.manual_seed(settings.run.seed)
    model, source = settings.build_model(), f"the initial weights of seed {settings.run.seed}"
    if weights is not None:
        checkpoint.take_weights(model, weights)
        source += f", begun with {weights}"
    return State(source, -1, model.state_dict(), config)


def choose(run: Path, earlier: str | None, weights: Path | None) -> tuple[State, State]:
    """The earlier and the later state of a run.

    Args:
        run: the folder of a run, whose newest checkpoint is the later state, or a checkpoint.
        earlier: a checkpoint or INITIAL. None = the oldest one that the run has kept, INITIAL where it has no other.
        weights: with INITIAL, the checkpoint of another run that the run was given.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: there is no such state.
    """
    path = run
    if run.is_dir():
        kept = checkpoint.checkpoints(run / "checkpoints")
        if not kept:
            raise FileNotFoundError(f"{run} is not the folder of a run: it has no checkpoints")
        path = kept[0]
    later = read(path)
    if earlier is None:
        oldest = checkpoint.checkpoints(path.resolve().parent)[-1:]
        earlier = INITIAL if oldest in ([], [path.resolve()]) else oldest[0]
    if earlier == INITIAL:
        return initial(later.config, weights), later
    if weights is not None:
        raise ValueError(f"--weights {weights} goes with EARLIER initial, this compares with {earlier}")
    return read(Path(earlier)), later


def problems(findings: Sequence[Finding]) -> list[str]:
    """Why the proof fails, a line each; empty where it holds."""
    lines = [
        f"FROZEN BUT MOVED: {finding.name}, by up to {finding.change:.3g}"
        for finding in findings
        if finding.frozen and finding.moved
    ]
    if not any(finding.moved for finding in findings if not finding.frozen):
        lines.append("NOTHING WAS TRAINED: no trained tensor moved, so it proves nothing that no frozen one did")
    return lines


def warnings(findings: Sequence[Finding]) -> list[str]:
    """What looks odd but proves nothing, a line each."""
    return [f"trained but did not move: {f.name}" for f in findings if not f.frozen and not f.moved]


def write_json(path: Path, earlier: State, later: State, findings: Sequence[Finding]) -> None:
    """Writes every tensor's hashes and the verdict."""
    ends = {name: dict(source=s.source, step=s.step) for name, s in (("earlier", earlier), ("later", later))}
    found = dict(problems=problems(findings), warnings=warnings(findings))
    tensors = [asdict(finding) | dict(moved=finding.moved) for finding in findings]
    path.write_text(json.dumps(dict(holds=not problems(findings), **ends, **found, tensors=tensors), indent=1) + "\n")
