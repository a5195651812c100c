"""The record of an experiment (system B): what ran, how fast, in how much memory, how well, and what follows.

Everything comes from the run folders and from evaluating their best checkpoints; nothing is written by hand.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..modules.completion.cascade import CompletionCascade, RigWindow
from . import checkpoint
from .config import Experiment, update
from .systems import experiment
from .systems.completion.evaluate import BASELINES, Score, evaluate_completion, scenarios

SPEED, MEMORY, ACCURACY = 1.2, 0.7, 0.01  # what the documents expect of a whole run, V2 against V1


@dataclass
class Run:
    """One trained run. `scores` are at the scale that stage 1 completes."""

    folder: Path
    settings: Experiment
    log: list[dict]
    scores: list[Score]

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

    def figure(self, scenario: str, method: str, name: str = "relative_l2") -> float:
        return next(getattr(s, name) for s in self.scores if (s.scenario, s.method) == (scenario, method))


def read_log(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_run(folder: Path, windows: int, data: str | None, device: torch.device, progress=lambda text: None) -> Run:
    """Evaluates the best checkpoint (else the last) of a run on up to `windows` validation windows, spread evenly."""
    log = read_log(folder)
    settings, model = _restore(folder, data, device)
    _, validation = settings.build_data()
    stride = max(1, len(validation) // windows)
    chosen = list(islice(range(0, len(validation), stride), windows))

    def batches():
        for count, index in enumerate(chosen, 1):
            progress(f"{folder.name}: window {count} of {len(chosen)}")
            yield settings.collate([validation[0, index]]).to(device)

    which = scenarios(model.dropout.cameras, settings.data.history)
    scores = evaluate_completion(model, batches(), which, settings.model.temporal.depths)
    scale = model.temporal.stride if model.temporal is not None else max(model.backbone.strides)
    return Run(folder, settings, log, [score for score in scores if score.stride == scale])


def model_and_window(run: Run, data: str | None, device: torch.device) -> tuple[CompletionCascade, RigWindow]:
    """A run's network and the middle window of its validation set."""
    settings, model = _restore(run.folder, data, device)
    _, validation = settings.build_data()
    return model, settings.collate([validation[0, len(validation) // 2]]).to(device)


def _restore(folder, data, device):
    best = folder / "checkpoints" / "best.pt"
    state = checkpoint.load(best if best.exists() else best.with_name("last.pt"))
    settings = experiment(state["config"]["name"])
    update(settings, state["config"])
    if data:
        settings.data.root = data
    model = settings.build_model().to(device)
    checkpoint.load_weights(model, state["model"], folder)
    return settings, model


def by_config(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same experiment with other seeds stand together."""
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
    return text + (" ± " + form.format(statistics.stdev(values)) if len(values) > 1 else "")


def runs_table(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["run", "config", "seed", "batch", "steps", "it/s", "peak MiB", "best validation", "last loss"]]
    for run in runs:
        settings = run.settings
        validated = [line[f"val/{settings.metric}"] for line in run.log if f"val/{settings.metric}" in line]
        losses = [line["loss"] for line in run.log if "loss" in line]
        rows.append(
            [
                run.folder.name,
                settings.name,
                str(settings.run.seed),
                f"{settings.loader.batch_size} × {settings.run.accumulate}",
                str(run.steps),
                f"{run.speed:.2f}",
                f"{run.memory:.0f}",
                f"{settings.metric} {min(validated):.4f}" if validated else "—",
                f"{losses[-1]:.4f}" if losses else "—",
            ]
        )
    return rows


def scores_table(groups: dict[str, list[Run]], name: str) -> list[list[str]]:
    """Scenario × method; figures are means over the seeds, with their spread."""
    everyone = [run for runs in groups.values() for run in runs]
    rows = [["scenario", *BASELINES, *groups]]
    for scenario in dict.fromkeys(score.scenario for score in everyone[0].scores):
        cells = [spread([run.figure(scenario, method, name) for run in everyone]) for method in BASELINES]
        cells += [spread([run.figure(scenario, "completed", name) for run in runs]) for runs in groups.values()]
        rows.append([scenario, *cells])
    return rows


def verdicts(groups: dict[str, list[Run]]) -> list[list[str]]:
    """Each claim about V2 against V1, where exactly one experiment of each was run."""
    pairs = [(name, name.replace("v2", "v1")) for name in groups if "v2" in name and name.replace("v2", "v1") in groups]
    rows = [["claim", "figure", "verdict"]]
    for v2, v1 in pairs:
        mean = lambda runs, what: statistics.mean(getattr(run, what) for run in runs)  # noqa: E731
        speed = mean(groups[v2], "speed") / mean(groups[v1], "speed")
        memory = mean(groups[v2], "memory") / mean(groups[v1], "memory")
        rows.append([f"{v2}: speed of a whole run +20 to +40 %", f"× {speed:.2f}", _verdict(speed >= SPEED)])
        rows.append([f"{v2}: memory of a whole run −30 to −50 %", f"× {memory:.2f}", _verdict(memory <= MEMORY)])
        rows.append([f"{v2}: completion as good as V1's", *_as_good(groups[v1], groups[v2])])
    return rows


def _as_good(v1: Sequence[Run], v2: Sequence[Run]) -> tuple[str, str]:
    """Mean relative error over the single cameras; equal if within 1 %, or within the spread of V1's seeds."""
    errors = [[_mean_single(run) for run in runs] for runs in (v1, v2)]
    difference = statistics.mean(errors[1]) - statistics.mean(errors[0])
    noise = statistics.stdev(errors[0]) if len(errors[0]) > 1 else 0.0
    allowed = max(ACCURACY * statistics.mean(errors[0]), 2 * noise)
    text = f"relative L2 {spread(errors[1])} against {spread(errors[0])}, {difference:+.4f} (allowed ± {allowed:.4f})"
    return text, _verdict(difference <= allowed)


def _mean_single(run: Run) -> float:
    return statistics.mean(run.figure(name, "completed") for name in run_cameras(run))


def run_cameras(run: Run) -> list[str]:
    return [
        name for name in dict.fromkeys(score.scenario for score in run.scores) if name.isupper() and "+" not in name
    ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
