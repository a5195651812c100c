"""Measures what driving loses when cameras are missing, over all tasks, and what completion gives back.

    cd work_dirs
    python ../train/tools/camera_loss_table.py sparsedrive_small_stage2{,_v1,_v2,_v3} --out ../runs/camera_loss

Runs without completion are measured with black images and with images that the head does not look at; runs with it as
they are. Runs of one configuration with other seeds are taken together. Writes report.md, cells.json and table.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, check_new, in_one_line
from rigfuse.train.run import open_run
from rigfuse.train.systems.sparse_drive.camera_loss import FIGURES, Cell, measure, report, scenarios, values


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or checkpoints")
    parser.add_argument("--data", metavar="ROOT", help="a folder in nuScenes format instead of the runs'")
    parser.add_argument("--singles", action="store_true", help="only single cameras, no pairs")
    parser.add_argument("--lasting", type=int, default=0, help="moments that a fault lasts (default: the whole drive)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    return parser.parse_args(arguments)


def draw(cells: list[Cell], path: Path) -> None:
    """A panel for each figure: scenarios across, a bar for each method."""
    shown = [figure for figure in FIGURES if any(figure in cell.figures for cell in cells)]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    names = list(dict.fromkeys(cell.scenario for cell in cells))
    figure = Figure(figsize=(max(8, 0.8 * len(names)), 2.4 * len(shown)), layout="constrained")
    for axes, what in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown):
        for place, method in enumerate(methods):
            found = [values(cells, method, name, what) for name in names]
            heights = [sum(each) / len(each) if each else float("nan") for each in found]
            x = [index + 0.8 * (place + 0.5) / len(methods) - 0.4 for index in range(len(names))]
            axes.bar(x, heights, 0.8 / len(methods), label=method)
        axes.set_ylabel(what, fontsize=8)
        axes.set_xticks(range(len(names)), [name.replace("CAM_", "") for name in names], rotation=30, fontsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("camera_loss_table", ValueError, OSError, ImportError, CheckpointError):
        check_new("--out", chosen.out)
        runs = [open_run(path, chosen.data) for path in chosen.runs]
        cameras = runs[0].settings.model.head.cameras if hasattr(runs[0].settings.model, "head") else ()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        which = scenarios(cameras, not chosen.singles, chosen.lasting)
        cells = measure(runs, which, device, lambda text: print(text, file=sys.stderr, flush=True))
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
        text = report(cells, chosen.lasting)
        (chosen.out / "report.md").write_text(text)
        draw(cells, chosen.out / "table.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
