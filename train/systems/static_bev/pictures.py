"""Pictures of the ground: prediction beside truth, the history it was made with, and the weights of a gate."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from ....modules.static_bev.grid import BevGrid
from ....modules.static_bev.head import HeadConfig
from ....modules.static_bev.losses import StaticTruth
from ....modules.static_bev.network import StaticBev
from ....modules.static_bev.rotated import corners
from .evaluate import Said

# Probabilities from which on something is drawn: the documents'. Classes without one of their own have that of roads.
LANE, ROAD = 0.75, 0.75
THRESHOLDS = {"Freespace": 0.5, "StopLine": 0.6, "Crosswalk": 0.9}
_AREAS = {"Road": (0.25, 0.25, 0.28), "Lane": (0.38, 0.38, 0.42), "Curb": (0.2, 0.75, 0.35), "Wall": (0.65, 0.4, 0.25)}
_OTHER_AREA, _UNKNOWN_LINE = (0.3, 0.45, 0.6), (0.8, 0.8, 0.8)
_COLOURS = tuple(f"C{index}" for index in range(10))


def draw_said(model: StaticBev, said: Said, truth: StaticTruth, row: int, title: str = "") -> Figure:
    """Draws one sample: above what is said and what is true; below what was remembered, brought into the present, and
    for a gate how much each of it counts.

    Args:
        model: which said it.
        said: of the sample.
        truth: of its batch.
        row: its place in the batch.
        title: over all.
    """
    head, grid = model.config.head, model.head.grid
    lanes, past = len(head.lanes), _past(model, said)
    figure = Figure(figsize=(12, 8.4 if past else 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    upper, *lower = figure.subfigures(2 if past else 1, 1, squeeze=False)[:, 0]
    left, right = upper.subplots(1, 2)
    maps = said.maps.float().cpu()
    _ground(left, "predicted", maps[:lanes] - LANE, maps[lanes:] - _levels(head), None, head, grid)
    _boxes(left, said.instances.boxes.cpu(), head)
    coverage = [getattr(truth, name)[row].float().cpu() / 255 - 0.5 for name in ("lanes", "road", "unknown_lanes")]
    _ground(right, "true", *coverage, head, grid)
    _boxes(right, truth.instances[row].cpu(), head)
    if past:
        _history(lower[0], past, model.config.grid.features())
    return figure


def _levels(head: HeadConfig) -> torch.Tensor:
    return torch.tensor([THRESHOLDS.get(name, ROAD) for name in head.road])[:, None, None]


def _past(model, said) -> list[tuple[str, np.ndarray]]:
    """(title, map) of what was remembered and of the weights."""
    if said.past is None:
        return []
    maps, seen = model.fusion.align(said.past)
    drawn = []
    for place, (age, interval) in enumerate(zip(said.past.ages[0].tolist(), model.config.history.intervals)):
        what = f"{age:.2f} s ago" if age == age else f"nothing {interval:g} s ago"
        strength = maps[0, place].float().mean(0).where(seen[0, place] > 0.5, torch.nan)
        drawn.append((what, strength.cpu().numpy()))
    if said.weights is not None:
        names = ["now", *(f"{interval:g} s" for interval in model.config.history.intervals)]
        drawn += [(f"weight: {name}", weight.float().cpu().numpy()) for name, weight in zip(names, said.weights)]
    return drawn


def _ground(axes, title, lanes, road, unknown, head: HeadConfig, grid: BevGrid):
    """Colours the cells of what is above 0: areas, then lines by class."""
    image = np.full((*grid.shape, 3), 0.08)
    others = [name for name in head.road if name not in _AREAS]
    for name in (*others, *(name for name in _AREAS if name in head.road)):  # lines last, over the areas
        image[(road[head.road.index(name)] > 0).numpy()] = _AREAS.get(name, _OTHER_AREA)
    if unknown is not None:
        image[(unknown > 0).numpy()] = _UNKNOWN_LINE
    axes.imshow(image, origin="lower", extent=(*grid.x, *grid.y), interpolation="nearest")
    lanes, best = lanes.max(0)
    for label in best[lanes > 0].unique().tolist():
        v, u = np.nonzero(((best == label) & (lanes > 0)).numpy())
        points = grid.points(torch.from_numpy(np.stack([u, v], axis=1)).double()).numpy()
        axes.plot(*points.T, ".", color=_COLOURS[label % 10], markersize=1.5, label=head.lanes[label])
    if len(axes.lines):
        axes.legend(fontsize=5, markerscale=4, loc="upper right")
    axes.plot([0, 2], [0, 0], color="magenta", linewidth=2)  # the car, and where it heads
    axes.set_title(title, fontsize=9)
    axes.set(xlim=grid.x, ylim=grid.y)
    axes.tick_params(labelsize=6)


def _boxes(axes, boxes: torch.Tensor, head: HeadConfig):
    for box, outline in zip(boxes.tolist(), corners(boxes[:, :5]).numpy()):
        colour = ("yellow", "cyan", "white")[int(box[5]) % 3]
        axes.add_patch(Polygon(outline, fill=False, edgecolor=colour, linewidth=0.8))
        middle = outline[[0, 3]].mean(0)
        axes.plot([box[0], middle[0]], [box[1], middle[1]], color=colour, linewidth=0.6)


def _history(figure, past: Sequence[tuple[str, np.ndarray]], grid: BevGrid):
    for axes, (title, values) in zip(figure.subplots(1, len(past), squeeze=False)[0], past):
        limits = dict(vmin=0, vmax=1) if title.startswith("weight") else {}
        axes.imshow(values, origin="lower", extent=(*grid.x, *grid.y), interpolation="nearest", **limits)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=5)
