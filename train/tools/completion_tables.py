"""Makes one of the tables of the planned experiments on completion: trains what it needs, and evaluates it.

    python train/tools/completion_tables.py warp --data runs/world --out runs/tables --cfg-options \
        model.backbone.weights=work_dirs/depth_tiny/checkpoints/best.pt

missing     1, 2 or 3 of six cameras
filling     zeros, copy, warp, the VAE alone, temporal with and without motion, with stage 3, side by side, V3
warp        no warp, one depth, several, learned offsets, V3
history     0 to 3 moments
topology    itself, its neighbours, all
trajectory  none, predicted, ground truth
duration    how long the fault lasts

Configurations are the tiny ones; --full takes the documents'. Runs lie in OUT/runs and are shared by the tables; what
is trained already is not trained again. The table is printed and written to OUT/TABLE.md.
"""

import argparse
import sys
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, in_one_line
from rigfuse.train.record import RecordOptions
from rigfuse.train.systems.completion.tables import TABLES, make_table
from rigfuse.train.trainer import TrainingError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--data", required=True, metavar="ROOT", help="a folder in nuScenes' format")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for runs and tables")
    parser.add_argument("--seeds", type=int, default=3, help="of each row (default: 3)")
    parser.add_argument("--windows", type=int, default=64, help="validation windows to evaluate (default: 64)")
    parser.add_argument("--full", action="store_true", help="the documents' configurations, not the tiny ones")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every run")
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "windows"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} is {getattr(chosen, name)}, needs at least 1")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell = lambda text: print(f"completion_tables: {text}", file=sys.stderr, flush=True)  # noqa: E731
    with in_one_line("completion_tables", ValueError, OSError, CheckpointError, TrainingError):
        chosen.out.mkdir(parents=True, exist_ok=True)
        text = make_table(
            chosen.table,
            chosen.out,
            RecordOptions(chosen.windows, device),
            data=chosen.data,
            seeds=chosen.seeds,
            tiny=not chosen.full,
            settings=chosen.cfg_options,
            progress=tell,
        )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
