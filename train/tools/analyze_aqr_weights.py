"""Shows how a trained detector routes its queries: AQR's weights by modality, distance and class, and the bias scale.

    python train/tools/analyze_aqr_weights.py work_dirs/cmt_aqr_voxel0100_r50_800x320_cbgs --data ROOT --out runs/aqr

Every validation sample is run three times: as it is, with black images, and without LiDAR points. A query's distance is
that of its reference point from the ego, horizontally; its class is its best one in the first run where that scores
--score or more, else background. So the same queries are compared in all three.

The folder gets report.md, weights.json and the pictures.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, console
from rigfuse.train.systems.cmt_aqr.routing import open_routed, read_batches, route, write_report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, or one of its checkpoints"
    )
    parser.add_argument("--data", required=True, metavar="ROOT", help="a folder in nuScenes format")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--samples", type=int, default=100, metavar="N", help="validation samples at most (default: 100)"
    )
    parser.add_argument(
        "--score", type=float, default=0.1, help="that makes a query more than background (default: 0.1)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.samples < 1:
        parser.error(f"--samples is {chosen.samples}, needs at least 1")
    if not 0 < chosen.score <= 1:
        parser.error(f"--score is {chosen.score:g}, needs above 0 and at most 1")
    if chosen.out.exists():
        parser.error(f"--out {chosen.out}: exists already; choose a new folder")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from rich.markdown import Markdown

    shown = console()
    partial = None
    try:
        run = open_routed(chosen.run, chosen.data)
        model = run.build_model(device)
        with shown.status("reading") as status:
            batches = read_batches(run.settings, chosen.samples, status.update)
            routed = route(model, batches, chosen.score, getattr(torch, run.settings.run.amp))
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{chosen.out.name}.", dir=chosen.out.parent))
        text = write_report(partial, run, model, routed, chosen.score)
        partial.rename(chosen.out)
    except (OSError, ValueError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    shown.print(Markdown(text.replace("![", "[")))
    shown.print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
