"""What LiDAR points lie on: boxes name the objects, the map its lines."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...data.map_truth import MAP_CLASSES, MapLines
from ...data.moments import Box

_TEXEL = 0.25  # metres of the picture in which lines are drawn
_WIDTH = 3  # texels of a line: what is painted or built there is about so wide
_FLAT = 0.5  # metres above or below the ego frame's ground up to which a point can be on it


def labels_of_points(
    points: torch.Tensor,
    classes: Sequence[str],
    boxes: Sequence[Box],
    lines: MapLines | None,
    map_size: tuple[float, float],
) -> torch.Tensor:
    """What each point is on.

    Args:
        points: (P, 3 + …) x, y, z in the ego frame, metres.
        classes: names of nuScenes' detection classes and of `MAP_CLASSES`; all else has no label.
        boxes: in the ego frame.
        lines: of the map, in the ego frame; None = unknown. A crossing is its area, another line a strip of 0.75 m.
        map_size: metres ahead and behind, and to both sides, that have lines.

    Returns:
        (P,) int64 places in `classes`, −1 = on none of them. Of several boxes the last one counts, and boxes before
        lines.
    """
    labels = torch.full((len(points),), -1)
    if lines is not None:
        labels = _on_lines(points, classes, lines, map_size)
    for box in boxes:
        name = box.detection_class
        if name in classes:
            labels[box.holds(points)] = classes.index(name)
    return labels


def _on_lines(points, classes, lines, map_size):
    rows, columns = (round(side / _TEXEL) for side in map_size)
    drawn = Image.new("L", (columns, rows))  # of 1 + the place in `classes`
    draw = ImageDraw.Draw(drawn)
    for name in ("ped_crossing", "boundary", "divider"):  # later ones over earlier ones
        if name not in classes:
            continue
        for line in (lines.lines[place] for place in np.flatnonzero(lines.labels == MAP_CLASSES.index(name))):
            corners = [tuple(corner) for corner in ((line + np.array(map_size) / 2) / _TEXEL)[:, ::-1].tolist()]
            ink = 1 + classes.index(name)
            if name == "ped_crossing":
                draw.polygon(corners, fill=ink)
            else:
                draw.line(corners, fill=ink, width=_WIDTH)
    picture = torch.from_numpy(np.array(drawn)).long() - 1
    half = points.new_tensor(map_size) / 2
    row, column = ((points[:, :2] + half) / _TEXEL).floor().long().unbind(1)
    there = (row >= 0) & (row < rows) & (column >= 0) & (column < columns) & (points[:, 2].abs() <= _FLAT)
    return torch.where(there, picture[row.clamp(0, rows - 1), column.clamp(0, columns - 1)], -1)
