"""Makes the ground-truth cache of map detection: the lines around every sample of both splits, in npz and JSON.

    python train/tools/generate_gt_cache.py --config map_qformer_stage2 --data ROOT
    python train/tools/generate_gt_cache.py --config map_qformer_stage2 --data ROOT --split mini_val
    python train/tools/generate_gt_cache.py --config map_qformer_stage2 --data ROOT --anchors runs/anchors.json

Training makes what is missing itself; this makes it beforehand and says what is in it. The JSON index beside each npz
holds the settings, the digest of the tables and map expansions that the lines are of, and that of the npz: a cache of
other settings or tables is not taken, and a damaged one is refused.
"""

import argparse
import json
import sys
from pathlib import Path

from rigfuse.train.command_line import Parser, TextTable, choose, console, in_one_line, patience
from rigfuse.train.config import apply_options, check
from rigfuse.train.data.cache import cache_index
from rigfuse.train.data.driving_truth import DrivingTruth, TruthConfig, truth_cache, truth_key
from rigfuse.train.data.map_truth import MAP_CLASSES
from rigfuse.train.data.splits import split_names
from rigfuse.train.systems import experiment
from rigfuse.train.systems.map_qformer.anchors import find_anchors, write_anchors
from rigfuse.train.systems.map_qformer.experiment import MapExperiment


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="NAME", required=True, help="an experiment of map_qformer")
    parser.add_argument("--data", metavar="ROOT", required=True, help="a folder in nuScenes format")
    parser.add_argument("--split", metavar="NAME", help="only this one of the two")
    parser.add_argument("--anchors", metavar="FILE", type=Path, help="also write where the training lines mostly are")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], help="settings to change")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    table = TextTable("Ground truth", ["split", "samples", *MAP_CLASSES, "closed", "metres", "npz sha256"], 1)
    with in_one_line("generate_gt_cache", ValueError, OSError, ImportError):
        settings = experiment(chosen.config)
        if not isinstance(settings, MapExperiment):
            raise ValueError(f"--config is {chosen.config}; needs an experiment of map_qformer")
        settings.data.root = chosen.data
        check(apply_options(settings, chosen.cfg_options))
        data, kept = settings.data, TruthConfig(settings.model.line_range)
        splits = [name for name in split_names(data) if name]
        for split in [choose("split", chosen.split, splits)] if chosen.split else splits:
            with patience(f"{split}: cutting lines out of the maps"):
                cache = truth_cache(data.cache, data.root, data.version, split, kept)
            index = cache_index(data.cache, split, truth_key(data.root, data.version, kept))
            table.rows.append([split, *counts(cache), json.loads(index.read_text())["sha256"][:16]])
            print(index.with_suffix(".npz"))
        if chosen.anchors:
            with patience("looking for where lines mostly are"):
                write_anchors(chosen.anchors, find_anchors(settings.build_data()[0], settings.run.seed), data)
            print(f"{chosen.anchors}: for --cfg-options anchors={chosen.anchors}")
    table.print(console())
    return 0


def counts(cache) -> list[str]:
    """Samples, lines of each class, closed ones among them, and how long all are."""
    import numpy as np

    labels, closed, metres = [], 0, 0.0
    for token in cache:
        lines = DrivingTruth.from_arrays(cache[token]).map
        labels += lines.labels.tolist()
        closed += sum(bool((line[0] == line[-1]).all()) for line in lines.lines)
        metres += sum(float(np.hypot(*np.diff(line, axis=0).T).sum()) for line in lines.lines)
    found = np.bincount(np.array(labels, dtype=np.int64), minlength=len(MAP_CLASSES))
    return [f"{len(cache):,}", *(f"{count:,}" for count in found), f"{closed:,}", f"{metres:,.0f}"]


if __name__ == "__main__":
    sys.exit(main())
