"""Writes the record of trained runs: speed, memory, losses and figures of each, and what its system adds.

    python train/tools/write_record.py work_dirs/completion_v1_tiny work_dirs/completion_v2_tiny --out runs/record

Runs of one configuration with other seeds are taken together. The folder gets record.md and the pictures. Runs of
completion are evaluated once more: every camera, every pair of neighbours, lost moments, and V2's claims against V1.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, console
from rigfuse.train.record import RecordOptions, write_record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--windows", type=int, default=32, help="validation windows to evaluate (default: 32)")
    parser.add_argument("--data", metavar="ROOT", help="evaluate on another folder in nuScenes format")
    chosen = parser.parse_args(arguments)
    if chosen.windows < 1:
        parser.error(f"--windows is {chosen.windows}, needs at least 1")
    if chosen.out.exists():
        parser.error(f"--out {chosen.out}: exists already; choose a new folder")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = console()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{chosen.out.name}.", dir=chosen.out.parent))
    try:
        with shown.status("evaluating") as status:
            options = RecordOptions(chosen.windows, device, chosen.data, status.update)
            text = write_record(chosen.runs, partial, options)
        partial.rename(chosen.out)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(text)
    shown.print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
