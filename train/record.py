"""The record of an experiment (system B): what ran, how fast, in how much memory, how well, and what follows.

Everything comes from the run folders and, for what a system adds, from evaluating their best checkpoints; nothing is
written by hand. Runs of one configuration with other seeds are taken together.

A system adds to the record of its runs by a method of its experiment:

    record_sections(runs: list[Run], folder: Path, options: RecordOptions) -> list[str]

which returns sections in Markdown and puts its pictures and tables into `folder`.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import Experiment
from .run import SavedRun, open_run, read_log


@dataclass(frozen=True)
class Run:
    """One trained run: its folder, its best checkpoint (else the last), and the records of its log."""

    folder: Path
    saved: SavedRun
    log: list[dict]

    @property
    def settings(self) -> Experiment:
        return self.saved.settings

    @property
    def speed(self) -> float:
        """Median steps per second, the first record (warm-up) left out where there are more."""
        values = [line["speed/it_per_s"] for line in self.log if "speed/it_per_s" in line]
        return statistics.median(values[1:] or values)

    @property
    def memory(self) -> float:
        """Peak MiB: of the allocator on a GPU, of the process elsewhere."""
        return max(line["memory/peak_mib"] for line in self.log if "memory/peak_mib" in line)

    @property
    def steps(self) -> int:
        return max(line["step"] for line in self.log)

    @property
    def machine(self) -> dict:
        """What it was trained on, see `log.machine`; empty where it did not come to its end."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()).get("machine", {}) if path.is_file() else {}

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best evaluation in training, by the experiment's own metric; empty where there is none."""
        name, choose = f"val/{self.settings.metric}", min if self.settings.metric_mode == "min" else max
        evaluations = [line for line in self.log if not math.isnan(line.get(name, math.nan))]
        if not evaluations:
            return {}
        line = choose(evaluations, key=lambda line: line[name])
        return {key.removeprefix("val/"): value for key, value in line.items() if key.startswith("val/")}


@dataclass(frozen=True)
class RecordOptions:
    """What a record is written with.

    Args:
        windows: validation samples that are evaluated at most, spread evenly.
        device: on which.
        data: a folder in nuScenes format instead of the one that the runs were trained on.
        progress: is told what is being done.
    """

    windows: int
    device: torch.device
    data: str | None = None
    progress: Callable[[str], None] = lambda text: None


def load_run(folder: Path, data: str | None = None) -> Run:
    """Opens a run for the record; errors as those of `open_run` and `read_log`."""
    log = read_log(folder)  # first: it tells a folder that is none of a run
    return Run(folder, open_run(folder, data), log)


def write_record(folders: Sequence[Path], out: Path, options: RecordOptions) -> str:
    """Writes record.md and the pictures of runs into a folder and returns the text.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a folder is not that of a run, or its checkpoint cannot be used.
    """
    runs = [load_run(folder, options.data) for folder in folders]
    sections = ["# Record\n", *general_sections(runs, out)]
    systems = defaultdict(list)
    for run in runs:
        systems[type(run.settings)].append(run)
    for system, own_runs in systems.items():
        if hasattr(system, "record_sections"):
            sections += own_runs[0].settings.record_sections(own_runs, out, options)
    text = "\n".join(sections)
    (out / "record.md").write_text(text)
    return text


def general_sections(runs: Sequence[Run], folder: Path) -> list[str]:
    """What every record has: the runs, their best validation figures, and their losses."""
    draw_losses(runs, folder / "losses.png")
    return [
        "## Runs\n",
        markdown(runs_table(runs)),
        "Peak memory is the allocator's on a GPU and the whole process's on a CPU.\n",
        "![losses](losses.png)\n",
        "## Validation figures of the best checkpoints\n",
        markdown(figures_table(by_config(runs))),
    ]


def by_config(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Configuration → its runs, which differ in their seeds."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.settings.name].append(run)
    return dict(groups)


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation over seeds, or the value itself."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "—"
    text = form.format(statistics.mean(values))
    return text + (" ± " + form.replace("+", "").format(statistics.stdev(values)) if len(values) > 1 else "")


def runs_table(runs: Sequence[Run]) -> list[list[str]]:
    head = [
        "run",
        "config",
        "seed",
        "batch",
        "epochs",
        "steps",
        "rate",
        "it/s",
        "peak MiB",
        "best validation",
        "last loss",
    ]
    rows = [[*head, "trained on"]]
    for run in runs:
        settings, best = run.settings, run.best
        losses = [line["loss"] for line in run.log if "loss" in line]
        rows.append(
            [
                run.folder.name,
                settings.name,
                str(settings.run.seed),
                f"{settings.loader.batch_size} × {settings.run.accumulate} × {run.machine.get('ranks', 1)}",
                str(settings.run.epochs),
                str(run.steps),
                f"{settings.optim.lr:g}",
                f"{run.speed:.2f}",
                f"{run.memory:.0f}",
                f"{settings.metric} {best[settings.metric]:.4f}" if best else "—",
                f"{losses[-1]:.4f}" if losses else "—",
                ", ".join(f"{name} {value}" for name, value in run.machine.items()) or "—",
            ]
        )
    return rows


def figures_table(groups: dict[str, list[Run]]) -> list[list[str]]:
    """Figure × configuration, of the best evaluations; figures are means over the seeds, with their spread."""
    best = {name: [run.best for run in runs] for name, runs in groups.items()}
    names = dict.fromkeys(figure for found in best.values() for figures in found for figure in figures)
    return [["figure", *groups]] + [
        [name, *(spread([figures.get(name, math.nan) for figures in found], "{:.4f}") for found in best.values())]
        for name in names
    ]


def draw_losses(runs: Sequence[Run], path: Path) -> None:
    """Draws the loss of each run over its steps."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for run in runs:
        points = [(line["step"], line["loss"]) for line in run.log if "loss" in line]
        axes.plot(*zip(*points), label=run.folder.name)
    axes.legend()
    figure.savefig(path, dpi=120)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
