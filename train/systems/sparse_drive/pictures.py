"""Pictures of driving: boxes, tracks, futures, map lines and the plan on the images and from above, truth beside."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ....modules.sparse_drive.head import HeadConfig
from ....modules.sparse_drive.results import DriveResult
from ...metrics.planning import rectangles
from ...pictures import LINE_COLOURS, by_place, draw_path, on_ground, show_image
from .baselines import results_of_truth
from .evaluate import Seen

_PLAN = "magenta"
# Corners of a box joined by an edge: the lower face, the upper one, between them, and what shows the front.
_FACE = (0, 1, 2, 3, 0)
_RING = tuple(zip(_FACE, _FACE[1:]))
_EDGES = (*_RING, *((a + 4, b + 4) for a, b in _RING), *((a, a + 4) for a in range(4)), (0, 7), (3, 4))


@dataclass(frozen=True)
class Threshold:
    """Scores from which on something is drawn."""

    boxes: float = 0.25
    lines: float = 0.3


def draw_moment(seen: Seen, head: HeadConfig, threshold: Threshold = Threshold()) -> Figure:
    """Draws one sample: what the model says on the left, what is true on the right.

    A box has a colour by its track, with its likeliest future; the plan is magenta.
    """
    truth = seen.batch.truth
    figure = Figure(figsize=(16, 8), layout="constrained")
    found, true = figure.subfigures(1, 2)
    found.suptitle("predicted", fontsize=10)
    true.suptitle("true", fontsize=10)
    on_cpu = type(truth)(**{f.name: _on_cpu(getattr(truth, f.name)) for f in fields(truth)})
    _draw(found, seen, _sure(seen.result, threshold), head)
    _draw(true, seen, results_of_truth(on_cpu, seen.index), head)
    return figure


def draw_scene(moments: Sequence[Seen], head: HeadConfig, path: Path, threshold: Threshold = Threshold()) -> None:
    """Writes a GIF of some moments, half a second each."""
    frames = []
    for seen in moments:
        canvas = FigureCanvasAgg(draw_moment(seen, head, threshold))
        canvas.figure.set_dpi(60)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128))
    if not frames:
        raise ValueError("draw_scene: there are no moments")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)


def _sure(result: DriveResult, threshold: Threshold) -> DriveResult:
    result = DriveResult(**{name: None if x is None else x.cpu() for name, x in vars(result).items()})
    boxes, lines = result.class_scores >= threshold.boxes, result.line_scores >= threshold.lines
    for names, chosen in ((_OF_BOXES, boxes), (_OF_LINES, lines)):
        for name in names:
            values = getattr(result, name)
            setattr(result, name, None if values is None else values[chosen])
    return result


_OF_BOXES = ("boxes", "scores", "class_scores", "labels", "ids", "futures", "future_scores")
_OF_LINES = ("lines", "line_scores", "line_labels")


def _draw(figure, seen, result, head):
    """Images above in two rows, the view from above below."""
    axes = figure.subplot_mosaic([[0, 1, 2], [3, 4, 5], [6, 6, 6]], height_ratios=(1, 1, 2.4))
    images, projection = seen.batch.images[seen.index, -1], seen.batch.frames[-1].image_T_ego[seen.index]
    for place in range(6):
        axes[place].set_axis_off()
    for place, name in enumerate(by_place(head.cameras)[:6]):
        camera = head.cameras.index(name)
        show_image(axes[place], images[camera], name)
        _on_image(axes[place], projection[camera].cpu(), result, head)
    _from_above(axes[6], result, head)


def _colour(result, row):
    return f"C{int(result.ids[row]) % 10}"


def _future(result, row):
    """The likeliest places (steps, 2) after the present one; None where there are none."""
    if result.futures is None:
        return None
    mode = 0 if result.future_scores is None else int(result.future_scores[row].argmax())
    return torch.cat([result.boxes[row, None, :2], result.futures[row, mode]])


def _on_image(axes, image_T_ego, result, head):
    for row in range(len(result.boxes)):
        corners = box_corners(result.boxes[row])
        gap = corners.new_full((3,), torch.nan)
        edges = torch.stack([point for a, b in _EDGES for point in (corners[a], corners[b], gap)])
        draw_path(axes, edges, image_T_ego, color=_colour(result, row), linewidth=0.7)
        way = _future(result, row)
        if way is not None:
            draw_path(
                axes,
                on_ground(way, head.ego.ground),
                image_T_ego,
                color=_colour(result, row),
                linewidth=0.7,
                linestyle=":",
            )
    for line, label in zip(result.lines, result.line_labels):
        colour = LINE_COLOURS.get(head.line_classes[label], "grey")
        draw_path(axes, on_ground(line, head.ego.ground), image_T_ego, color=colour, linewidth=0.7)
    if result.plan is not None:
        way = torch.cat([torch.zeros(1, 2), result.plan])
        draw_path(axes, on_ground(way, head.ego.ground), image_T_ego, color=_PLAN, linewidth=1.5)


def box_corners(box: torch.Tensor) -> torch.Tensor:
    """(8, 3) corners of a box (7 or more): x, y, z, length, width, height, yaw. Four below, counter-clockwise from the
    front left one, then those above them."""
    x, y, z, length, width, height, yaw = box[:7].double().tolist()
    below = torch.from_numpy(rectangles(np.array([[x, y]]), [length], [width], np.array([yaw])))[0]
    return torch.cat([torch.cat([below, below.new_full((4, 1), z + side * height / 2)], 1) for side in (-1, 1)]).float()


def _from_above(axes, result, head):
    """Ahead is to the right."""
    for line, label in zip(result.lines, result.line_labels):
        axes.plot(*line.T.numpy(), color=LINE_COLOURS.get(head.line_classes[label], "grey"), linewidth=1)
    for row, box in enumerate(result.boxes):
        outline = box_corners(box)[[0, 1, 2, 3, 0], :2]
        axes.plot(*outline.T.numpy(), color=_colour(result, row), linewidth=1)
        way = _future(result, row)
        if way is not None:
            axes.plot(*way.T.numpy(), color=_colour(result, row), linewidth=0.8, linestyle=":")
    x, y, z, length, width, height, yaw = head.ego.box
    own = torch.tensor([x, y, z, length, width, height, yaw])
    axes.plot(*box_corners(own)[[0, 1, 2, 3, 0], :2].T.numpy(), color="black", linewidth=1.2)
    if result.plan is not None:
        axes.plot(*torch.cat([torch.zeros(1, 2), result.plan]).T.numpy(), color=_PLAN, linewidth=2)
    half = [0.5 * side for side in head.line_range]
    axes.set(xlim=(-half[0] - 10, half[0] + 10), ylim=(-half[1] - 5, half[1] + 5), aspect="equal")
    axes.tick_params(labelsize=6)


def _on_cpu(value):
    if isinstance(value, list):
        return [tensor.cpu() for tensor in value]
    return None if value is None else value.cpu()
