"""Puts a trained driving model beside rivals that have learned nothing: all figures on the validation split.

    python train/tools/compare_driving.py work_dirs/sparsedrive_small_stage1_tiny --data runs/world --out runs/driving

model       the best checkpoint of the run
untrained   the same network with random weights and the run's anchors
memory      the truth of the training moment whose images look most alike

Writes figures.json and report.md to the folder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, patience
from rigfuse.train.metrics.any_class import FIGURES as ANY_FIGURES
from rigfuse.train.record import markdown
from rigfuse.train.run import open_run
from rigfuse.train.systems.sparse_drive.baselines import Memory, one_by_one
from rigfuse.train.systems.sparse_drive.evaluate import DrivingFigures, evaluate_driving
from rigfuse.train.systems.sparse_drive.experiment import DriveExperiment

SHOWN = (
    "mAP",
    "NDS",
    *ANY_FIGURES,
    "map/mAP",
    "tracking/AMOTA",
    "motion/minADE/car",
    "plan/L2/mean",
    "plan/collision/mean",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, or one of its checkpoints"
    )
    parser.add_argument("--data", metavar="ROOT", help="a folder in nuScenes format instead of the run's")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where to write")
    return parser.parse_args(arguments)


def compare(run, device: torch.device) -> dict[str, dict[str, float]]:
    """Figures of each rival."""
    settings = run.settings
    training, validation = settings.build_data()
    found = {}
    for name, model in (("model", run.build_model(device)), ("untrained", _untrained(run, device))):
        with patience(f"{name}: validation split", True):
            found[name] = evaluate_driving(settings, model, (b.to(device) for b in one_by_one(validation)))
    with patience("memory: both splits", True):
        figures = DrivingFigures(settings, settings.model.head)
        for seen in Memory(training).drive(batch.to("cpu") for batch in one_by_one(validation)):
            figures.add(seen)
        found["memory"] = figures.compute()
    return found


def _untrained(run, device):
    torch.manual_seed(run.settings.run.seed)
    return run.settings.build_model().to(device)


def report(found: dict[str, dict[str, float]], source: Path) -> str:
    """Markdown: a row for each figure, a column for each rival."""
    names = [name for name in SHOWN if any(name in figures for figures in found.values())]
    names += [name for name in found["model"] if name.startswith(("AP/", "map/AP/")) and "@" not in name]
    cell = lambda figures, name: f"{figures[name]:.4f}" if name in figures else "n/a"  # noqa: E731
    rows = [["figure", *found], *([name, *(cell(figures, name) for figures in found.values())] for name in names)]
    rivals = [name for name in found["model"] if name.startswith("plan/") and name.count("/") > 2]
    rows += [[name, cell(found["model"], name), *["" for _ in list(found)[1:]]] for name in rivals]
    return f"# {source}\n\n{markdown(rows)}"


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        run = open_run(chosen.run, chosen.data)
        if not isinstance(run.settings, DriveExperiment):
            raise ValueError(f"{chosen.run} is of {run.settings.name}; needs a run of sparse_drive")
        found = compare(run, device)
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
        text = report(found, run.path)
        (chosen.out / "report.md").write_text(text)
    except (OSError, ValueError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
