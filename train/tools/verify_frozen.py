"""Proves by hashes that what is frozen did not move between two checkpoints of a run, and that the rest did.

    python train/tools/verify_frozen.py work_dirs/cmt_aqr_voxel0100_r50_800x320_cbgs
    python train/tools/verify_frozen.py work_dirs/RUN/checkpoints/last.pt initial --json frozen.json

EARLIER is a checkpoint, or the word initial: what the run began with, made again from its settings and its seed. That
takes the same torch, the same files of pretrained weights, and the same --weights if the run was given one. Default:
the oldest checkpoint that the run has kept, and initial where it has no other.

Frozen is what training would freeze with the settings in the checkpoint: parameters without gradient, and every buffer
but the statistics of batch norms that train. Compared are the sha256 of each tensor's bytes.

Exit status: 0 nothing frozen moved; 1 something did, nothing was trained, or a checkpoint cannot be used; 2 the command
line is mistaken.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from rigfuse.train import checkpoint
from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser
from rigfuse.train.config import Experiment, diff, update
from rigfuse.train.optim import parameter_groups, set_training
from rigfuse.train.systems import experiment

INITIAL = "initial"
_LISTED = 20  # names in the terminal; --json has all


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


def frozen_names(model: nn.Module, settings: Experiment) -> set[str]:
    """Which tensors of the model's state training with these settings leaves as they are."""
    parameter_groups(model, settings.optim)  # freezes what these freeze
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
    """Of the values' bytes in row-major order, whatever the memory format is."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def compare(earlier: State, later: State) -> list[Finding]:
    """Every tensor of the model that the settings of `later` build.

    Raises:
        ValueError: `earlier` is not earlier, or the settings are none of an experiment's.
        CheckpointError: a state does not fit the model.
    """
    if earlier.step >= later.step:
        steps = f"{earlier.source} is of step {earlier.step} and {later.source} of step {later.step}"
        raise ValueError(f"EARLIER: {steps}, needs an earlier one")
    settings = _without_files(_settings(later.config))
    model = settings.build_model()
    for state in (earlier, later):
        checkpoint.load_weights(model, state.weights, state.source)
    frozen, findings = frozen_names(model, settings), []
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
    state = checkpoint.load(path)
    return State(str(path), state["counters"]["step"], state["model"], state["config"])


def initial(config: dict, weights: Path | None) -> State:
    """What a run with these settings begins with, drawn as the trainer draws it."""
    settings = _settings(config)
    torch.manual_seed(settings.run.seed)
    model, source = settings.build_model(), f"the initial weights of seed {settings.run.seed}"
    if weights is not None:
        checkpoint.take_weights(model, weights)
        source += f", begun with {weights}"
    return State(source, -1, model.state_dict(), config)


def choose(run: Path, earlier: str | None, weights: Path | None) -> tuple[State, State]:
    """The earlier and the later state for the arguments of the command."""
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
        lines.append("NOTHING WAS TRAINED: no trained tensor moved, so that the frozen ones did not says nothing")
    return lines


def warnings(findings: Sequence[Finding]) -> list[str]:
    return [f"trained but did not move: {f.name}" for f in findings if not f.frozen and not f.moved]


def parts_table(findings: Sequence[Finding]) -> Table:
    table = Table("part")
    for column in ("tensors", "parameters", "frozen", "frozen tensors", "of them moved", "trained tensors", "moved"):
        table.add_column(column, justify="right")
    for part in (*dict.fromkeys(finding.part for finding in findings), "all"):
        own = [finding for finding in findings if part in (finding.part, "all")]
        frozen, trained = ([f for f in own if f.frozen == kind] for kind in (True, False))
        count, still = (sum(f.parameters for f in some) for some in (own, frozen))
        share = f"{still / count:.0%}" if count else "—"
        moved = (sum(f.moved for f in some) for some in (frozen, trained))
        cells = zip((len(frozen), len(trained)), moved)
        table.add_row(part, f"{len(own)}", f"{count:,}", share, *(f"{cell}" for pair in cells for cell in pair))
    return table


def show(console: Console, earlier: State, later: State, findings: Sequence[Finding]) -> None:
    console.print(f"{later.source} (step {later.step}) against {earlier.source}", soft_wrap=True)
    for line in diff(earlier.config, later.config):
        console.print(f"  changed: {line}", markup=False, soft_wrap=True)
    console.print(parts_table(findings))
    for lines in (problems(findings), warnings(findings)):
        for line in lines[:_LISTED]:
            console.print(line, markup=False, soft_wrap=True)
        if len(lines) > _LISTED:
            console.print(f"… and {len(lines) - _LISTED} more")
    if problems(findings) and earlier.step < 0:
        console.print("That holds if the run began so: with this torch, these files, and this --weights or none.")
    if not problems(findings):
        frozen = sum(finding.frozen for finding in findings)
        console.print(f"{frozen} frozen tensors did not move" if frozen else "nothing is frozen in this run")


def write(path: Path, earlier: State, later: State, findings: Sequence[Finding]) -> None:
    ends = {name: dict(source=s.source, step=s.step) for name, s in (("earlier", earlier), ("later", later))}
    found = dict(problems=problems(findings), warnings=warnings(findings))
    tensors = [asdict(finding) | dict(moved=finding.moved) for finding in findings]
    path.write_text(json.dumps(dict(holds=not problems(findings), **ends, **found, tensors=tensors), indent=1) + "\n")


def _settings(config: dict) -> Experiment:
    return update(experiment(config["name"]), config)


def _without_files(config):
    """The settings without files of pretrained weights: these may be gone, and do not say what is frozen."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            _without_files(value)
        elif field.name == "weights":
            setattr(config, field.name, None)
    return config


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, or one of its checkpoints"
    )
    parser.add_argument("earlier", nargs="?", metavar="EARLIER", help="a checkpoint, or the word initial")
    parser.add_argument(
        "--weights", type=Path, metavar="CKPT", help="the --weights that the run was given; with initial"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every tensor's hashes and the verdict")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        earlier, later = choose(chosen.run, chosen.earlier, chosen.weights)
        findings = compare(earlier, later)
        if chosen.json:
            write(chosen.json, earlier, later, findings)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(console, earlier, later, findings)
    return int(bool(problems(findings)))


if __name__ == "__main__":
    sys.exit(main())
