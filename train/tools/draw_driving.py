"""Draws what a driving model sees, predicts and plans, with the truth beside it, and a short film of a scene.

    python train/tools/draw_driving.py work_dirs/sparsedrive_small_stage2_tiny --out runs/pictures
    python train/tools/draw_driving.py RUN --scene world-0001 --moments 12 --out runs/pictures

Boxes have a colour by track, with their likeliest future; map lines one by class; the plan is magenta. Writes a PNG for
each moment and SCENE.gif.
"""

import argparse
import sys
from pathlib import Path

import torch

from rigfuse.train.command_line import Parser, check_new, in_one_line, nearest
from rigfuse.train.run import open_run
from rigfuse.train.systems.sparse_drive.evaluate import drive
from rigfuse.train.systems.sparse_drive.experiment import DriveExperiment
from rigfuse.train.systems.sparse_drive.pictures import Threshold, draw_moment, draw_scene


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run, or one of its checkpoints")
    parser.add_argument("--data", metavar="ROOT", help="a folder in nuScenes format instead of the run's")
    parser.add_argument("--scene", metavar="NAME", help="a scene of the validation split (default: the first)")
    parser.add_argument("--moments", type=int, default=8, help="how many of its moments, from the first on (default 8)")
    parser.add_argument("--boxes", type=float, default=0.25, help="draw boxes from this score on (default 0.25)")
    parser.add_argument("--lines", type=float, default=0.3, help="draw map lines from this score on (default 0.3)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("draw_driving", ValueError, OSError, ImportError, RuntimeError):
        check_new("--out", chosen.out)
        run = open_run(chosen.run, chosen.data)
        if not isinstance(run.settings, DriveExperiment):
            raise ValueError(f"{chosen.run} is of {run.settings.name}; needs a run of sparse_drive")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, (_, samples) = run.build_model(device), run.settings.build_data()
        names = [drive.name for drive in samples.drives]
        scene = chosen.scene or names[0]
        if scene not in names:
            raise ValueError(f"--scene is {scene!r}{nearest(scene, names)}")
        indices = [i for i, (place, _) in enumerate(samples.places) if names[place] == scene][: chosen.moments]
        batches = (run.settings.collate([samples[0, index]]).to(device) for index in indices)
        moments = list(drive(model, batches, run.settings.results))
        chosen.out.mkdir(parents=True, exist_ok=True)
        threshold, head = Threshold(chosen.boxes, chosen.lines), model.head.config
        for number, seen in enumerate(moments):
            draw_moment(seen, head, threshold).savefig(chosen.out / f"{scene}-{number:03d}.png", dpi=100)
        draw_scene(moments, head, chosen.out / f"{scene}.gif", threshold)
    print(f"{len(moments)} moments of {scene} in {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
