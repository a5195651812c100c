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
import sys
from collections.abc import Sequence
from pathlib import Path

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, console
from rigfuse.train.config import diff
from rigfuse.train.frozen import Finding, State, choose, compare, problems, warnings, write_json

_LISTED = 20  # names in the terminal; --json has all


def parts_table(findings: Sequence[Finding]):
    """Counts tensors and parameters of each part of the network; returns rich's Table."""
    from rich.table import Table

    table = Table("part")
    for column in ("tensors", "parameters", "frozen", "frozen tensors", "of them moved", "trained tensors", "moved"):
        table.add_column(column, justify="right")
    for part in (*dict.fromkeys(finding.part for finding in findings), "all"):
        members = [finding for finding in findings if part in (finding.part, "all")]
        frozen, trained = ([f for f in members if f.frozen == kind] for kind in (True, False))
        count, still = (sum(f.parameters for f in some) for some in (members, frozen))
        share = f"{still / count:.0%}" if count else "—"
        moved = (sum(f.moved for f in some) for some in (frozen, trained))
        cells = zip((len(frozen), len(trained)), moved)
        table.add_row(part, f"{len(members)}", f"{count:,}", share, *(f"{cell}" for pair in cells for cell in pair))
    return table


def show(screen, earlier: State, later: State, findings: Sequence[Finding]) -> None:
    """Prints what was compared, the counts, and what was found."""
    screen.print(f"{later.source} (step {later.step}) against {earlier.source}", soft_wrap=True)
    for line in diff(earlier.config, later.config):
        screen.print(f"  changed: {line}", markup=False, soft_wrap=True)
    screen.print(parts_table(findings))
    for lines in (problems(findings), warnings(findings)):
        for line in lines[:_LISTED]:
            screen.print(line, markup=False, soft_wrap=True)
        if len(lines) > _LISTED:
            screen.print(f"… and {len(lines) - _LISTED} more")
    if problems(findings) and earlier.step < 0:
        screen.print("That holds if the run began so: with this torch, these files, and this --weights or none.")
    if not problems(findings):
        frozen = sum(finding.frozen for finding in findings)
        screen.print(f"{frozen} frozen tensors did not move" if frozen else "nothing is frozen in this run")


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
    screen = console()
    try:
        earlier, later = choose(chosen.run, chosen.earlier, chosen.weights)
        findings = compare(earlier, later)
        if chosen.json:
            write_json(chosen.json, earlier, later, findings)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(screen, earlier, later, findings)
    return int(bool(problems(findings)))


if __name__ == "__main__":
    sys.exit(main())
