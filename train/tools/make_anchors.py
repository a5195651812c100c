"""Finds the anchors of a driving model in its training split: where boxes and lines are seen, which ways are driven.

    python train/tools/make_anchors.py --config sparsedrive_small_stage1 --data ROOT --out anchors.json
    python train/main.py --config sparsedrive_small_stage1 --data ROOT --cfg-options anchors=anchors.json

k-means over the training split, the same on every run. The file has the digest of the tables that they are of.
"""

import argparse
import sys
from pathlib import Path

from rigfuse.train.command_line import Parser, patience
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.anchors import find_anchors, write_anchors
from rigfuse.train.systems.sparse_drive.experiment import DriveExperiment


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="NAME", required=True, help="a driving experiment")
    parser.add_argument("--data", metavar="ROOT", required=True, help="a folder in nuScenes format")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], help="settings to change")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        settings = experiment(chosen.config)
        if not isinstance(settings, DriveExperiment):
            raise ValueError(f"{chosen.config} has no anchors; needs an experiment of sparse_drive")
        settings.data.root = chosen.data
        check(apply_options(settings, chosen.cfg_options))
        with patience(f"{chosen.config}: looking through the training split", True):
            anchors = find_anchors(settings.build_data()[0], settings.run.seed)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_anchors(chosen.out, anchors, settings.data.root, settings.data.version)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{chosen.out}: {len(anchors.boxes)} boxes, {len(anchors.lines)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
