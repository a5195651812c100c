"""Reports what static BEV says of the validation split, alone and with cameras missing, and draws some of it.

    python train/tools/report_static_bev.py work_dirs/static_bev_step2_tiny --out runs/static
    python train/tools/report_static_bev.py RUN_WITHOUT_TIME RUN_WITH_TIME --lose CAM_FRONT CAM_BACK --out runs/static
    python train/tools/report_static_bev.py without-0 without-1 with-0 with-1 --lose all --untrained --out runs/static

Of each run: IoU, series evaluation of lanes by sub-class, range and confidence, average precision of instances. Of all
together: each figure with nothing missing and with each camera of --lose (all = every camera) missing at the moment
that is judged; the past has seen it. Runs whose names differ in a number behind a dash, the seed, share a column.
Writes report.md, figures.json and RUN-TOKEN.png: what is said, what is true, the past brought into the present and, of
a gate, its weights.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser, check_new, in_one_line
from rigfuse.train.run import SavedRun, open_run, without_weight_files
from rigfuse.train.systems.static_bev.evaluate import Judged, measure
from rigfuse.train.systems.static_bev.experiment import StaticBevExperiment
from rigfuse.train.systems.static_bev.pictures import draw_said
from rigfuse.train.systems.static_bev.report import NO_LOSS, comparison, report

REMEMBERED = 1000  # moments


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or checkpoints")
    parser.add_argument("--data", metavar="ROOT", help="a folder in nuScenes format instead of the runs'")
    parser.add_argument("--split", metavar="NAME", help="of the validation (default: the run's)")
    parser.add_argument(
        "--lose", nargs="+", default=[], metavar="CAMERA", help="cameras, one at a time; all = every one"
    )
    parser.add_argument("--every", type=int, default=0, metavar="N", help="judge one moment of N (default: the runs')")
    parser.add_argument("--untrained", action="store_true", help="the first run's network with random weights, too")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="samples drawn of each run (default 4)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    chosen = parser.parse_args(arguments)
    if chosen.every < 0:
        parser.error(f"--every is {chosen.every}, needs at least 1")
    return chosen


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("report_static_bev", ValueError, OSError, ImportError, CheckpointError):
        check_new("--out", chosen.out)
        cells, parts = {}, []
        for place, source in enumerate([*chosen.runs[:1], *chosen.runs] if chosen.untrained else chosen.runs):
            judge(open_run(source, chosen.data), chosen, chosen.untrained and not place, cells, parts)
        chosen.out.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(["# Runs side by side", comparison(cells), *parts])
        (chosen.out / "report.md").write_text(text)
        rows = [dict(run=run, lost=loss, figures=figures) for (run, loss), figures in cells.items()]
        (chosen.out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(comparison(cells))
    return 0


def judge(run: SavedRun, chosen: argparse.Namespace, untrained: bool, cells: dict, parts: list) -> None:
    """Adds the figures of a run, or of its network untrained, to `cells`, and its report to `parts`."""
    settings, name = run.settings, "untrained" if untrained else run.folder.name
    if not isinstance(settings, StaticBevExperiment):
        raise ValueError(f"{run.path} is of {settings.name}; needs a run of static_bev")
    settings.data.cache, settings.data.val_split = "", chosen.split or settings.data.val_split
    settings.evaluation.every = chosen.every or settings.evaluation.every
    if chosen.lose:  # every moment is looked at repeatedly
        settings.data.remember, settings.model.backbone.remember = REMEMBERED, 6 * REMEMBERED
    samples = settings.build_data()[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = without_weight_files(settings).build_model().to(device) if untrained else run.build_model(device)
    model.eval().requires_grad_(False).set_cameras(samples.names)
    for loss in (NO_LOSS, *(samples.names if chosen.lose == ["all"] else chosen.lose)):
        print(f"{name}: {loss}", file=sys.stderr, flush=True)
        config = replace(settings.evaluation, lost=() if loss == NO_LOSS else (loss,))
        batches = (settings.collate([samples[0, index]]).to(device) for index in range(len(samples)))
        draws = loss == NO_LOSS and not untrained
        judged, moments = Judged(config), map(samples.moment, range(len(samples)))
        count = sum(judged(moment.scene, moment.timestamp) for moment in moments) if draws else 0
        look = pictures(model, chosen, name, count) if draws else None
        rival = settings.mean_map(model) if loss == NO_LOSS else None  # it says the same whatever is missing
        measured = measure(model, batches, config, samples.names, rival, look)
        cells[name, loss] = measured.figures()
        step = "untrained" if untrained else f"{name}, step {run.step}"
        parts += [f"# {step}", report(measured)] if loss == NO_LOSS else []


def pictures(model, chosen, name, count):
    """What draws `--pictures` samples, spread over all."""
    every, seen = max(count // max(chosen.pictures, 1), 1), [0]

    def look(batch, row, said):
        place, seen[0] = seen[0], seen[0] + 1
        if chosen.pictures and place % every == every - 1:
            chosen.out.mkdir(parents=True, exist_ok=True)
            figure = draw_said(model, said, batch.truth, row, f"{name}: {batch.tokens[row]}")
            figure.savefig(chosen.out / f"{name}-{batch.tokens[row]}.png", dpi=100)

    return look


if __name__ == "__main__":
    sys.exit(main())
