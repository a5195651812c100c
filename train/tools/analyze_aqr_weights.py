"""Shows how a trained detector routes its queries: AQR's weights by modality, distance and class, and the bias scale.

    python train/tools/analyze_aqr_weights.py work_dirs/cmt_aqr_voxel0100_r50_800x320_cbgs --data ROOT --out runs/aqr

Every validation sample is run three times: as it is, with black images, and without LiDAR points. A query's distance is
that of its reference point from the ego, horizontally; its class is its best one in the first run where that scores
--score or more, else background. So the same queries are compared in all three.

The folder gets report.md, weights.json and the pictures.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from rigfuse.modules.cmt_aqr.detector import CmtAqr
from rigfuse.modules.cmt_aqr.head import DETECTION_CLASSES
from rigfuse.train import checkpoint
from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.command_line import Parser
from rigfuse.train.config import Experiment, update
from rigfuse.train.data.splits import drives_of_splits
from rigfuse.train.record import markdown
from rigfuse.train.systems import experiment
from rigfuse.train.systems.cmt_aqr.data import DetectionBatch, DetectionSamples

MODALITIES = ("camera", "lidar")
DISTANCES = (0, 10, 20, 30, 40)  # metres: where each bin begins; the last has no end
BINS = (*(f"{a}–{b} m" for a, b in zip(DISTANCES, DISTANCES[1:])), f"{DISTANCES[-1]}+ m")
CLASSES = (*DETECTION_CLASSES, "background")
QUANTILES = (5, 25, 50, 75, 95)  # percent
SATURATED = 0.95  # |weight| above this
SCALE = "aqr/bias_scale"  # in log.jsonl
BOTH = "camera + LiDAR"
INPUTS: dict[str, Callable[[DetectionBatch], DetectionBatch]] = {
    BOTH: lambda batch: batch,
    "no image": lambda batch: replace(batch, images=torch.zeros_like(batch.images)),
    "no LiDAR": lambda batch: replace(batch, points=[points[:0] for points in batch.points]),
}


@dataclass(frozen=True)
class Routed:
    """All queries of all samples, M of them."""

    weights: dict[str, np.ndarray]  # input → (M, 2) float64: camera, LiDAR
    distance: np.ndarray  # (M,) metres
    label: np.ndarray  # (M,) place in CLASSES

    def groups(self) -> dict[str, np.ndarray]:
        """Name → (M,) bool: all queries, those of each distance, those of each class."""
        place = np.searchsorted(DISTANCES, self.distance, side="right") - 1
        found = {"all": np.ones(len(place), dtype=bool)}
        found |= {name: place == index for index, name in enumerate(BINS)}
        return found | {name: self.label == index for index, name in enumerate(CLASSES)}


def statistics(weights: np.ndarray) -> dict[str, float | int]:
    """Of weights (M,): how many, mean, standard deviation, quantiles, share below zero, share saturated."""
    if len(weights) == 0:
        return dict(count=0)
    quantiles = np.quantile(weights, np.array(QUANTILES) / 100)
    return dict(
        count=len(weights),
        mean=float(weights.mean()),
        std=float(weights.std()),
        **{f"q{percent}": float(value) for percent, value in zip(QUANTILES, quantiles)},
        negative=float((weights < 0).mean()),
        saturated=float((np.abs(weights) > SATURATED).mean()),
    )


@torch.no_grad()
def route(model: CmtAqr, batches: Iterable[DetectionBatch], score: float, autocast: torch.dtype) -> Routed:
    """Runs the detector, put into evaluation, on every batch with every one of `INPUTS`."""
    model.eval()
    device = next(model.parameters()).device
    weights, distance, label = {name: [] for name in INPUTS}, [], []
    for batch in batches:
        for name, masked in INPUTS.items():
            with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                output = model(masked(batch).to(device))
            weights[name].append(output.weights.flatten(0, 1).double().cpu().numpy())
            if name == BOTH:
                best, found = output.predictions.logits[-1].flatten(0, 1).sigmoid().max(dim=-1)
                label.append(torch.where(best >= score, found, len(DETECTION_CLASSES)).cpu().numpy())
                distance.append(torch.linalg.vector_norm(output.reference[..., :2], dim=-1).flatten().cpu().numpy())
    return Routed(
        {name: np.concatenate(parts) for name, parts in weights.items()}, *map(np.concatenate, (distance, label))
    )


def restore(source: Path, data: str, device: torch.device) -> tuple[Path, Experiment, CmtAqr]:
    """The checkpoint that `source` means (of a run the best, else the last), its settings, and its network."""
    path = source
    if source.is_dir():
        best = source / "checkpoints" / "best.pt"
        path = best if best.exists() else best.with_name("last.pt")
    state = checkpoint.load(path)
    settings = update(experiment(state["config"]["name"]), state["config"])
    if getattr(getattr(settings.model, "aqr", None), "generation", "none") == "none":
        raise ValueError(f"{path} is of {settings.name}, which has no AQR")
    settings.data.root = data
    settings.model.camera.weights = None  # the checkpoint has them
    model = settings.build_model().to(device)
    checkpoint.load_weights(model, state["model"], path)
    return path, settings, model


def read_batches(settings: Experiment, most: int, progress=lambda text: None):
    """Up to `most` validation samples, spread evenly, one a batch."""
    samples = DetectionSamples(drives_of_splits(settings.data)[1], settings.data, training=False)
    chosen = list(islice(range(0, len(samples), max(1, len(samples) // most)), most))
    for count, index in enumerate(chosen, 1):
        progress(f"sample {count} of {len(chosen)}")
        yield settings.collate([samples[0, index]])


def scale_history(path: Path) -> list[tuple[int, float]]:
    """(step, bias scale) as the checkpoint's run logged it; empty where there is no log, or nothing in it."""
    log = path.resolve().parent.parent / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [(line["step"], line[SCALE]) for line in lines if SCALE in line]


# ---- what is written


def figures(routed: Routed, name: str, members: np.ndarray, modality: int) -> dict[str, float | int]:
    """`statistics` with one input; `change`: mean |difference| of a query's weight from that with both modalities."""
    weights, both = (routed.weights[each][members, modality] for each in (name, BOTH))
    found = statistics(weights)
    return found | (dict(change=float(np.abs(weights - both).mean())) if len(weights) else {})


def table(routed: Routed, name: str) -> list[list[str]]:
    """Every group that has a query, with one input, a row for each modality."""
    head = ["queries", "weight of", "count", "mean", "std", *(f"{percent} %" for percent in QUANTILES)]
    rows = [[*head, "negative", "saturated", "change"]]
    for group, members in routed.groups().items():
        for m, modality in enumerate(MODALITIES if members.any() else ()):
            count, mean, std, *quantiles, negative, saturated, change = figures(routed, name, members, m).values()
            cells = [f"{count:,}", f"{mean:+.3f}", f"{std:.3f}", *(f"{value:+.3f}" for value in quantiles)]
            rows.append([group, modality, *cells, f"{negative:.1%}", f"{saturated:.1%}", f"{change:.3f}"])
    return rows


def scale_text(model: CmtAqr, history: list[tuple[int, float]]) -> str:
    bias = model.attention_bias_generator
    value = bias.bias_scale.item()
    text = f"{value:.4f}, used within [{bias.min_scale}, {bias.max_scale}]"
    if not history:
        return f"{text}; no log of it over training.\n"
    logged = [scale for _, scale in history]
    start, end = (f"{scale:.4f} at step {step}" for step, scale in (history[0], history[-1]))
    between = f"between {min(logged):.4f} and {max(logged):.4f}"
    return f"{text}. Logged: {start}, {end}, {between}.\n\n![scale](bias_scale.png)\n"


def write(folder: Path, path: Path, model: CmtAqr, routed: Routed, samples: int, score: float) -> str:
    biased = model.generation == "v3"
    history = scale_history(path) if biased else []
    change = "`change` is a query's mean |difference| from its weight with both modalities."
    text = [
        f"# AQR weights of {path}\n",
        f"{samples} validation samples; a class needs a score of {score:g}. {change}\n",
    ]
    if biased:
        text += ["## Bias scale\n", scale_text(model, history)]
    for name in INPUTS:
        text += [f"## {name}\n", markdown(table(routed, name))]
    text.append("![histogram](histogram.png)\n\n![means](means.png)\n")
    (folder / "report.md").write_text("\n".join(text))
    rows = [
        dict(input=name, group=group, modality=modality, **figures(routed, name, members, m))
        for name in INPUTS
        for group, members in routed.groups().items()
        for m, modality in enumerate(MODALITIES)
    ]
    scale = dict(value=model.attention_bias_generator.bias_scale.item(), logged=history) if biased else None
    found = dict(checkpoint=str(path), generation=model.generation, samples=samples, score=score, bias_scale=scale)
    (folder / "weights.json").write_text(json.dumps(found | dict(figures=rows), indent=1) + "\n")
    draw_histogram(routed, folder / "histogram.png")
    draw_means(routed, folder / "means.png")
    if history:
        draw_scale(history, folder / "bias_scale.png")
    return "\n".join(text)


def draw_histogram(routed: Routed, path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for m, (axes, modality) in enumerate(zip(figure.subplots(1, 2, sharey=True), MODALITIES)):
        for name, weights in routed.weights.items():
            axes.hist(weights[:, m], bins=80, range=(-1, 1), histtype="step", density=True, label=name)
        axes.set(title=f"weight of {modality}", xlabel="weight", ylabel="density")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_means(routed: Routed, path: Path) -> None:
    """By distance on the left, by class on the right; standard deviations as whiskers."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    groups = routed.groups()
    for axes, names in zip(figure.subplots(1, 2, sharey=True, width_ratios=(1, 2)), (BINS, CLASSES)):
        names = [name for name in names if groups[name].any()]
        for m, modality in enumerate(MODALITIES):
            own = [routed.weights[BOTH][groups[name], m] for name in names]
            spread = dict(yerr=[weights.std() for weights in own], capsize=2)
            axes.bar(np.arange(len(names)) + 0.4 * m - 0.2, [x.mean() for x in own], 0.4, label=modality, **spread)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_ylabel("mean weight")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_scale(history: list[tuple[int, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    figure.add_subplot(xlabel="step", ylabel="bias scale").plot(*zip(*history), marker=".")
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, or one of its checkpoints"
    )
    parser.add_argument("--data", required=True, metavar="ROOT", help="a folder in nuScenes format")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--samples", type=int, default=100, metavar="N", help="validation samples at most (default: 100)"
    )
    parser.add_argument(
        "--score", type=float, default=0.1, help="that makes a query more than background (default: 0.1)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.samples < 1:
        parser.error(f"--samples is {chosen.samples}, needs at least 1")
    if not 0 < chosen.score <= 1:
        parser.error(f"--score is {chosen.score:g}, needs above 0 and at most 1")
    if chosen.out.exists():
        parser.error(f"--out {chosen.out}: exists already; choose a new folder")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=None if sys.stdout.isatty() else 160)
    partial = None
    try:
        path, settings, model = restore(chosen.run, chosen.data, device)
        with console.status("reading") as status:
            batches = read_batches(settings, chosen.samples, status.update)
            routed = route(model, batches, chosen.score, getattr(torch, settings.run.amp))
        samples = len(routed.distance) // len(model.reference_points)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{chosen.out.name}.", dir=chosen.out.parent))
        text = write(partial, path, model, routed, samples, chosen.score)
        partial.rename(chosen.out)
    except (OSError, ValueError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    console.print(Markdown(text.replace("![", "[")))
    console.print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
