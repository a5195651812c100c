"""True map lines as networks learn them: equally many points each, in all orders that describe the same line."""

from collections.abc import Sequence

import numpy as np
import torch

from ...modules.polylines import line_orders
from ..metrics.map import resample
from .map_truth import MAP_CLASSES, MapLines


def line_targets(lines: MapLines, classes: Sequence[str], points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lines of some classes, (L, 2 · (points − 1), points, 2) float32 metres, see `line_orders`, and their places
    (L,) int64 in `classes`."""
    relabel = np.array([classes.index(name) if name in classes else -1 for name in MAP_CLASSES])
    labels = relabel[lines.labels]
    chosen, found = np.flatnonzero(labels >= 0), []
    for place in chosen:
        whole = lines.lines[place]
        line = torch.from_numpy(resample(whole, points)).float()
        if (whole[0] == whole[-1]).all():
            line[-1] = line[0]  # closed, to the bit
        found.append(line_orders(line))
    empty = torch.empty(0, 2 * (points - 1), points, 2)
    return torch.stack(found) if found else empty, torch.from_numpy(labels[chosen])
