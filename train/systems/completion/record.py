"""What the record of completion runs has besides what every record has: scores by scenario, verdicts, pictures."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

from ....modules.completion.cascade import CompletionCascade
from ...claims import ACCURACY, FAILS, HOLDS, RUN_MEMORY, RUN_SPEED, UNSURE
from ...record import RecordOptions, Run, by_config, markdown, spread
from . import pictures
from .baselines import random_features
from .evaluate import BASELINES, WARP_DEPTHS, Scenario, Score, evaluate_completion, scenarios

FIGURES = dict(
    relative_l2="Relative L2 error of the absent cameras' features (0 = as if they were there)",
    explained="Variance explained about the constant (1 = all; below 0 = worse than a mean that sees nothing)",
    corridor_relative_l2="Relative L2 error in the ego's corridor",
    cosine="Cosine similarity",
)


EXPLAINED = 1.3  # V3 is to explain so many times the variance that V2 explains


@dataclass(frozen=True)
class CompletionRun(Run):
    """A run with its scores at every scale."""

    scores: list[Score]
    remarks: list[str] = field(default_factory=list)  # what makes the figures mean less

    def figure(self, scenario: str, method: str, name: str = "relative_l2", stride: int | None = None) -> float:
        """One figure of one method in one scenario, at one stride or as the mean over them."""
        found = [s for s in self.scores if (s.scenario, s.method) == (scenario, method) and stride in (None, s.stride)]
        return statistics.mean(getattr(score, name) for score in found) if found else math.nan

    @property
    def scenarios(self) -> list[str]:
        """Every scenario's name."""
        return list(dict.fromkeys(score.scenario for score in self.scores))

    @property
    def cameras(self) -> list[str]:
        """The scenarios in which one camera is missing, and is missing only now."""
        return [name for name in self.scenarios if name.isupper() and "+" not in name]

    @property
    def strides(self) -> list[int]:
        """The scales."""
        return list(dict.fromkeys(score.stride for score in self.scores))

    @property
    def error(self) -> float:
        """Mean relative L2 error of the completed features over the single cameras and the scales."""
        return statistics.mean(self.figure(name, "completed") for name in self.cameras)


def sections(runs: Sequence[Run], folder: Path, options: RecordOptions) -> list[str]:
    """See `train.record`: tables of scores and verdicts; scores.json and the pictures go to the folder."""
    scored = [score_run(run, options) for run in runs]
    groups = by_config(scored)
    scores = {str(run.folder): [asdict(score) for score in run.scores] for run in scored}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    cameras = scored[0].cameras
    pictures.draw_errors(_errors_by_camera(groups, cameras), cameras, folder / "errors.png")
    _draw_features(scored[-1], folder / "features.png", options)
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    root = scored[0].settings.data.root
    windows = Path(root).name if root else "the built-in drive"
    return [
        "## Completion of missing cameras: verdicts\n",
        *(f"**{run.folder.name}: {line}**\n" for run in scored for line in run.remarks),
        markdown(verdicts(groups)),
        "## Variance explained about the constant by camera, mean over the scales\n",
        markdown(explained_table(groups)),
        f"Evaluated on {device}, torch {torch.__version__}, validation windows of {windows}.\n",
        *(
            f"## {title}, stride {stride}\n\n{markdown(scores_table(groups, name, stride))}"
            for name, title in FIGURES.items()
            for stride in sorted({stride for run in scored for stride in run.strides})
        ),
        "![errors](errors.png)\n\n![features](features.png)\n",
    ]


def score_run(run: Run, options: RecordOptions, which: Sequence[Scenario] | None = None) -> CompletionRun:
    """Evaluates a run's checkpoint on up to `options.windows` validation windows, spread evenly, in the scenarios
    `which`; None = every one of `scenarios`."""
    settings, model = run.settings, run.saved.build_model(options.device)
    _, validation = settings.build_data()
    stride = max(1, len(validation) // options.windows)
    chosen = list(islice(range(0, len(validation), stride), options.windows))

    def batches():
        for first in range(0, len(chosen), settings.loader.batch_size):
            together = chosen[first : first + settings.loader.batch_size]
            options.progress(f"{run.folder.name}: window {first + len(together)} of {len(chosen)}")
            yield settings.collate([validation[0, index] for index in together]).to(options.device)

    which = scenarios(model.dropout.cameras, settings.data.history) if which is None else which
    constant = constant_of(run, model)
    scores = evaluate_completion(model, batches(), which, WARP_DEPTHS, constant)
    return CompletionRun(run.folder, run.saved, run.log, scores, random_features(model))


def constant_of(run: Run, model: CompletionCascade) -> list[torch.Tensor]:
    """The constant of a run's checkpoint (`CompletionExperiment.constant`), kept in `constant.pt` of its folder."""
    settings, path = run.settings, run.folder / "constant.pt"
    of = dict(step=run.saved.step, data=str(settings.data.root), samples=settings.constant_samples)
    if path.is_file():
        kept = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        if kept["of"] == of:
            return kept["maps"]
    maps = settings.constant(model)
    writing = path.with_suffix(".writing")
    torch.save(dict(of=of, maps=maps), writing)
    writing.replace(path)
    return maps


def _errors_by_camera(groups, cameras):
    """Method → relative L2 error (cameras, runs): the baselines over all runs, then each configuration."""
    everyone = [run for runs in groups.values() for run in runs]
    methods = [(name, name, everyone) for name in BASELINES]
    methods += [(name, "completed", runs) for name, runs in groups.items()]
    return {
        name: torch.tensor([[run.figure(camera, method) for run in runs] for camera in cameras])
        for name, method, runs in methods
    }


def _draw_features(run, path, options):
    """The features of the middle window of a run's validation set."""
    _, validation = run.settings.build_data()
    window = run.settings.collate([validation[0, len(validation) // 2]]).to(options.device)
    pictures.draw_features(run.saved.build_model(options.device), window, ("CAM_FRONT", "CAM_BACK"), path)


def scores_table(groups: dict[str, list[CompletionRun]], name: str, stride: int) -> list[list[str]]:
    """Scenario × method at one scale; figures are means over the seeds, with their spread."""
    everyone = [run for runs in groups.values() for run in runs]
    columns = [(method, everyone) for method in BASELINES] + [("completed", runs) for runs in groups.values()]
    rows = [["scenario", *BASELINES, *groups]]
    for scenario in everyone[0].scenarios:
        cells = [spread([run.figure(scenario, method, name, stride) for run in runs]) for method, runs in columns]
        rows.append([scenario, *cells])
    return rows


def explained_table(groups: dict[str, list[CompletionRun]]) -> list[list[str]]:
    """Method × camera, and the mean over the cameras, with the spread over seeds."""
    everyone = [run for runs in groups.values() for run in runs]
    cameras = everyone[0].cameras
    rows = [["", *(name.removeprefix("CAM_") for name in cameras), "mean"]]
    methods = [(method, method, everyone) for method in BASELINES] + [
        (n, "completed", runs) for n, runs in groups.items()
    ]
    for name, method, runs in methods:
        figures = [[run.figure(camera, method, "explained") for run in runs] for camera in cameras]
        means = [statistics.mean(column) for column in zip(*figures)]
        rows.append([name, *(spread(each, "{:+.3f}") for each in [*figures, means])])
    return rows


def verdicts(groups: dict[str, list[CompletionRun]]) -> list[list[str]]:
    """Each claim about V2 against V1 and about V3 against V2, where exactly one experiment of each was run."""
    pairs = [(name, name.replace("v2", "v1")) for name in groups if "v2" in name and name.replace("v2", "v1") in groups]
    rows = [["claim", "figure", "verdict"]]
    for v2, v1 in pairs:
        speed, memory = (
            statistics.mean(getattr(run, what) for run in groups[v2])
            / statistics.mean(getattr(run, what) for run in groups[v1])
            for what in ("speed", "memory")
        )
        rows.append([f"{v2}: {RUN_SPEED.text}, a whole run", f"× {speed:.2f}", RUN_SPEED.verdict(speed)])
        rows.append([f"{v2}: {RUN_MEMORY.text}, a whole run", f"× {memory:.2f}", RUN_MEMORY.verdict(memory)])
        rows.append([f"{v2}: completion as good as V1's", *_as_good(groups[v1], groups[v2])])
    for v3, runs in groups.items():
        if "v3" in v3:
            v2 = groups.get(v3.replace("v3", "v2"))
            if v2 is not None:
                rows.append([f"{v3}: explains at least {EXPLAINED:g} times what V2 explains", *_explains(v2, runs)])
            for words, chosen in _cases(runs[0]).items():
                rows.append([f"{v3}: better than the constant, {words}", *_beats_the_constant(runs, chosen)])
    return rows


def _explains(v2: Sequence[CompletionRun], v3: Sequence[CompletionRun]) -> tuple[str, str]:
    """The mean variance explained over the single cameras and scales, three seeds or no verdict."""
    explained = [
        [statistics.mean(r.figure(c, "completed", "explained") for c in r.cameras) for r in runs] for runs in (v2, v3)
    ]
    before, after = (statistics.mean(values) for values in explained)
    ratio = f", × {after / before:.2f}" if before > 0 else ""
    text = f"{spread(explained[1], '{:+.3f}')} against {spread(explained[0], '{:+.3f}')}{ratio}"
    if min(map(len, explained)) < 3:
        return text, UNSURE
    return text, HOLDS if after > 0 and after >= EXPLAINED * before else FAILS


def _cases(run: CompletionRun) -> dict[str, list[str]]:
    """In words → scenarios."""
    return {
        "every camera and pair, every scale": [name for name in run.scenarios if name.isupper()],
        "every camera lost for longer than the history, every scale": [
            n for n in run.scenarios if "from the start" in n
        ],
    }


def _beats_the_constant(runs: Sequence[CompletionRun], chosen: Sequence[str]) -> tuple[str, str]:
    """The worst scenario and scale, by the mean over the seeds, three or no verdict."""
    figures = {
        (name, stride): statistics.mean(run.figure(name, "completed", "explained", stride) for run in runs)
        for name in chosen
        for stride in runs[0].strides
    }
    if not figures:
        return "—", UNSURE
    worst = min(figures, key=figures.get)
    text = f"worst: {worst[0]}, stride {worst[1]}, explains {figures[worst]:+.3f}"
    if len(runs) < 3:
        return text, UNSURE
    return text, HOLDS if figures[worst] > 0 else FAILS


def _as_good(v1: Sequence[CompletionRun], v2: Sequence[CompletionRun]) -> tuple[str, str]:
    """Compares the errors over the single cameras: equal if within 1 %, or within the spread of V1's seeds."""
    errors = [[run.error for run in runs] for runs in (v1, v2)]
    difference = statistics.mean(errors[1]) - statistics.mean(errors[0])
    noise = statistics.stdev(errors[0]) if len(errors[0]) > 1 else 0.0
    allowed = max(ACCURACY * statistics.mean(errors[0]), 2 * noise)
    text = f"relative L2 {spread(errors[1])} against {spread(errors[0])}, {difference:+.4f} (allowed ± {allowed:.4f})"
    return text, HOLDS if difference <= allowed else FAILS
