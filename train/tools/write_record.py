"""Evaluates trained runs and writes the record of the experiment: tables, verdicts, plots, pictures.

    python train/tools/write_record.py work_dirs/completion_v1_tiny work_dirs/completion_v2_tiny --out runs/record

Runs of one configuration with other seeds are taken together. The folder gets record.md, scores.json and the pictures.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from rigfuse.train import record
from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser
from rigfuse.train.record import Run, by_config, load_run, markdown
from rigfuse.train.systems.completion import pictures


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


def write(folder: Path, runs: list[Run], device: torch.device, data: str | None) -> str:
    groups = by_config(runs)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    source = data or runs[0].settings.data.root
    windows = Path(source).name if source else "the built-in drive"
    lines = [
        "# Completion of missing cameras\n",
        f"Evaluated on {name}, torch {torch.__version__}, validation windows of {windows}.\n",
        "## Runs\n",
        markdown(record.runs_table(runs)),
        "Peak memory is the allocator's on a GPU and the whole process's on a CPU.\n",
        "## Verdicts\n",
        markdown(record.verdicts(groups)),
        "## Relative L2 error of the absent cameras' features (0 = as if they were there)\n",
        markdown(record.scores_table(groups, "relative_l2")),
        "## The same in the ego's corridor\n",
        markdown(record.scores_table(groups, "corridor_relative_l2")),
        "## Cosine similarity\n",
        markdown(record.scores_table(groups, "cosine")),
        "![errors](errors.png)\n\n![losses](losses.png)\n\n![features](features.png)\n",
    ]
    text = "\n".join(lines)
    (folder / "record.md").write_text(text)
    scores = {str(run.folder): [asdict(score) for score in run.scores] for run in runs}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    pictures.draw_losses(runs, folder / "losses.png")
    pictures.draw_errors(groups, folder / "errors.png")
    pictures.draw_features(
        *record.model_and_window(runs[-1], data, device), ("CAM_FRONT", "CAM_BACK"), folder / "features.png"
    )
    return text


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{chosen.out.name}.", dir=chosen.out.parent))
    try:
        with console.status("evaluating") as status:
            runs = [load_run(folder, chosen.windows, chosen.data, device, status.update) for folder in chosen.runs]
            text = write(partial, runs, device, chosen.data)
        partial.rename(chosen.out)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(text)
    console.print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
