"""Puts trained map networks beside what has learned nothing: all figures on the validation split; and draws lines.

    python train/tools/compare_maps.py work_dirs/map_qformer_stage2_tiny --data runs/world --out runs/maps
    python train/tools/compare_maps.py work_dirs/a work_dirs/b --out runs/ablation --pictures 4

mean map    one map for every place: centres of the training split's lines, scored by how often they are there
untrained   the first run's network with its first weights

Writes figures.json, report.md and, for the first run, a picture of each of the first samples of the split.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, check_new, in_one_line, patience
from rigfuse.train.record import markdown
from rigfuse.train.run import open_run
from rigfuse.train.systems.map_qformer.baselines import MeanMap
from rigfuse.train.systems.map_qformer.experiment import MapExperiment, lines_of
from rigfuse.train.systems.map_qformer.pictures import draw_lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT", help="runs, or checkpoints of them")
    parser.add_argument("--data", metavar="ROOT", help="a folder in nuScenes format instead of the first run's")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="samples to draw (default 0)")
    parser.add_argument("--lines", type=float, default=0.3, help="draw lines from this score on (default 0.3)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    return parser.parse_args(arguments)


def batches(settings, samples, device):
    size = settings.loader.batch_size
    for first in range(0, len(samples), size):
        places = range(first, min(first + size, len(samples)))
        yield settings.collate([samples[0, place] for place in places]).to(device)


def compare(runs, device) -> dict[str, dict[str, float]]:
    """Figures by name; every run with data of its own settings, on the first one's root."""
    found, first = {}, runs[0]
    training, validation = first.settings.build_data()
    with patience("the mean map of the training split"):
        found["mean map"] = MeanMap(training).evaluate(batches(first.settings, validation, "cpu"))
    torch.manual_seed(first.settings.run.seed)
    models = {"untrained": (first, first.settings.build_model().to(device))}
    models |= {run.folder.name: (run, run.build_model(device)) for run in runs}
    for name, (run, model) in models.items():
        run.settings.data.root = first.settings.data.root
        samples = validation if run is first else run.settings.build_data()[1]
        with patience(f"{name}: validation split"):
            found[name] = run.settings.evaluate(model.eval(), batches(run.settings, samples, device))
    return found


def report(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each network, a column for each figure."""
    names = [name for name in found["mean map"] if "@" not in name]
    rows = [["", *names]]
    rows += [[run, *(f"{figures[n]:.4f}" if n in figures else "n/a" for n in names)] for run, figures in found.items()]
    return f"# Map AP on the validation split\n\n{markdown(rows)}"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("compare_maps", ValueError, OSError, ImportError, CheckpointError):
        check_new("--out", chosen.out)
        runs = [open_run(path, chosen.data) for path in chosen.runs]
        for run in runs:
            if not isinstance(run.settings, MapExperiment):
                raise ValueError(f"{run.path} is of {run.settings.name}; needs a run of map_qformer")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = compare(runs, device)
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
        (chosen.out / "report.md").write_text(report(found))
        if chosen.pictures:
            settings, model = runs[0].settings, runs[0].build_model(device).eval()
            samples = settings.build_data()[1]
            for place in range(min(chosen.pictures, len(samples))):
                batch = settings.collate([samples[0, place]]).to(device)
                figure = draw_lines(batch, 0, lines_of(model.find(batch), 0), settings.model, chosen.lines)
                figure.savefig(chosen.out / f"{place:03d}.png", dpi=100)
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
