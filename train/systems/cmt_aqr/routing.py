"""How a trained detector routes its queries: AQR's weights by modality, distance and class, and the bias scale.

Every sample is run three times: as it is, with black images, and without LiDAR points. A query's distance is that of
its reference point from the ego, horizontally; its class is its best one in the first run where that scores enough,
else background. So the same queries are compared in all three.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ....modules.cmt_aqr.detector import CmtAqr
from ....modules.detection.boxes import DETECTION_CLASSES
from ...data.splits import drives_of_splits
from ...record import markdown
from ...run import SavedRun, open_run, read_log
from .data import DetectionBatch, DetectionSamples
from .experiment import DetectionExperiment

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
        """Groups of queries, (M,) bool by name: all, those of each distance, those of each class."""
        place = np.searchsorted(DISTANCES, self.distance, side="right") - 1
        found = {"all": np.ones(len(place), dtype=bool)}
        found |= {name: place == index for index, name in enumerate(BINS)}
        return found | {name: self.label == index for index, name in enumerate(CLASSES)}


def statistics(weights: np.ndarray) -> dict[str, float | int]:
    """Counts weights (M,) and gives their mean, standard deviation, quantiles, share below zero and share saturated."""
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


def open_routed(source: Path, data: str) -> SavedRun:
    """Opens a run on a folder in nuScenes format; errors as those of `open_run`, and ValueError where it has no AQR."""
    run = open_run(source, data)
    if getattr(getattr(run.settings.model, "aqr", None), "generation", "none") == "none":
        raise ValueError(f"{run.path} is of {run.settings.name}, which has no AQR")
    return run


def read_batches(
    settings: DetectionExperiment, most: int, progress: Callable[[str], None] = lambda text: None
) -> Iterator[DetectionBatch]:
    """Up to `most` validation samples, spread evenly, one a batch."""
    samples = DetectionSamples(drives_of_splits(settings.data)[1], settings.data, training=False)
    chosen = list(islice(range(0, len(samples), max(1, len(samples) // most)), most))
    for count, index in enumerate(chosen, 1):
        progress(f"sample {count} of {len(chosen)}")
        yield settings.collate([samples[0, index]])


def scale_history(run: SavedRun) -> list[tuple[int, float]]:
    """Reads (step, bias scale) as the run logged it; empty where there is no log, or nothing in it."""
    try:
        log = read_log(run.folder)
    except FileNotFoundError:
        return []
    return [(line["step"], line[SCALE]) for line in log if SCALE in line]


# ---- what is written


def figures(routed: Routed, name: str, members: np.ndarray, modality: int) -> dict[str, float | int]:
    """The `statistics` of a group with one input, and `change`: the mean |difference| of a query's weight from the one
    with both modalities."""
    weights, both = (routed.weights[each][members, modality] for each in (name, BOTH))
    found = statistics(weights)
    return found | (dict(change=float(np.abs(weights - both).mean())) if len(weights) else {})


def table(routed: Routed, name: str) -> list[list[str]]:
    """Rows for every group that has a query, with one input: one for each modality."""
    head = ["queries", "weight of", "count", "mean", "std", *(f"{percent} %" for percent in QUANTILES)]
    rows = [[*head, "negative", "saturated", "change"]]
    for group, members in routed.groups().items():
        for m, modality in enumerate(MODALITIES if members.any() else ()):
            count, mean, std, *quantiles, negative, saturated, change = figures(routed, name, members, m).values()
            cells = [f"{count:,}", f"{mean:+.3f}", f"{std:.3f}", *(f"{value:+.3f}" for value in quantiles)]
            rows.append([group, modality, *cells, f"{negative:.1%}", f"{saturated:.1%}", f"{change:.3f}"])
    return rows


def scale_text(model: CmtAqr, history: list[tuple[int, float]]) -> str:
    """What is said about the bias scale: its value and how it got there."""
    bias = model.attention_bias_generator
    value = bias.bias_scale.item()
    text = f"{value:.4f}, used within [{bias.min_scale}, {bias.max_scale}]"
    if not history:
        return f"{text}; no log of it over training.\n"
    logged = [scale for _, scale in history]
    start, end = (f"{scale:.4f} at step {step}" for step, scale in (history[0], history[-1]))
    between = f"between {min(logged):.4f} and {max(logged):.4f}"
    return f"{text}. Logged: {start}, {end}, {between}.\n\n![scale](bias_scale.png)\n"


def write_report(folder: Path, run: SavedRun, model: CmtAqr, routed: Routed, score: float) -> str:
    """Writes report.md, weights.json and the pictures; returns the report."""
    biased = model.generation == "v3"
    history = scale_history(run) if biased else []
    samples = len(routed.distance) // len(model.reference_points)
    change = "`change` is a query's mean |difference| from its weight with both modalities."
    text = [
        f"# AQR weights of {run.path}\n",
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
    found = dict(checkpoint=str(run.path), generation=model.generation, samples=samples, score=score, bias_scale=scale)
    (folder / "weights.json").write_text(json.dumps(found | dict(figures=rows), indent=1) + "\n")
    draw_histogram(routed, folder / "histogram.png")
    draw_means(routed, folder / "means.png")
    if history:
        draw_scale(history, folder / "bias_scale.png")
    return "\n".join(text)


def draw_histogram(routed: Routed, path: Path) -> None:
    """Draws the distribution of the weights of each modality, a line for each input."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for m, (axes, modality) in enumerate(zip(figure.subplots(1, 2, sharey=True), MODALITIES)):
        for name, weights in routed.weights.items():
            axes.hist(weights[:, m], bins=80, range=(-1, 1), histtype="step", density=True, label=name)
        axes.set(title=f"weight of {modality}", xlabel="weight", ylabel="density")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_means(routed: Routed, path: Path) -> None:
    """Draws mean weights by distance on the left, by class on the right; standard deviations as whiskers."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    groups = routed.groups()
    for axes, names in zip(figure.subplots(1, 2, sharey=True, width_ratios=(1, 2)), (BINS, CLASSES)):
        names = [name for name in names if groups[name].any()]
        for m, modality in enumerate(MODALITIES):
            weights = [routed.weights[BOTH][groups[name], m] for name in names]
            spread = dict(yerr=[group.std() for group in weights], capsize=2)
            means = [group.mean() for group in weights]
            axes.bar(np.arange(len(names)) + 0.4 * m - 0.2, means, 0.4, label=modality, **spread)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_ylabel("mean weight")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_scale(history: list[tuple[int, float]], path: Path) -> None:
    """Draws the bias scale over the steps of training."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    figure.add_subplot(xlabel="step", ylabel="bias scale").plot(*zip(*history), marker=".")
    figure.savefig(path, dpi=120)
