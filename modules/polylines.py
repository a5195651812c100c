"""Map lines as polylines of equally many points: the orders of their points, matching, where instances begin."""

import math
from collections.abc import Callable

import torch

from .detection.matching import Match, assign, class_costs

FAR = 1e5  # metres; where the points of an order lie that a line does not have


def line_orders(line: torch.Tensor) -> torch.Tensor:
    """All orders of a line's points that describe the same line.

    Args:
        line: (P, 2) metres. A last point that repeats the first makes it closed.

    Returns:
        (2 · (P − 1), P, 2): for a closed line every start in both directions; for an open one itself, its reverse, and
        FAR points in the place of the others, so that all lines stack.
    """
    count = len(line) - 1
    if not torch.equal(line[0], line[-1]):
        orders = torch.stack([line, line.flip(0)])
        return torch.cat([orders, line.new_full((2 * count - 2, *line.shape), FAR)])
    ring = line[:-1]
    starts = torch.stack([ring.roll(-shift, dims=0) for shift in range(count)])
    orders = torch.cat([starts, starts.flip(1)])
    return torch.cat([orders, orders[:, :1]], dim=1)


@torch.no_grad()
def match_lines(
    logits: torch.Tensor,
    points: torch.Tensor,
    lines: torch.Tensor,
    labels: torch.Tensor,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    class_cost: float,
    line_cost: float,
) -> list[Match]:
    """Matches the instances of one sample to its lines, whatever the order of their points (MapTR: Liao et al. 2023).

    Args:
        logits: (layers, N, classes) floating.
        points: (layers, N, P, 2), in the unit of `lines`.
        lines: (L, orders, P, 2), see `line_orders`.
        labels: (L,) int64.
        distance: of two sets of lines that broadcast, (…, P, 2) each → (…).
        class_cost, line_cost: weights of what a match adds to the focal loss, and of the least distance of any order.

    Returns:
        One match for each layer, `order` says which one the distance is least in; no gradients.
    """
    if not len(lines):
        none = labels.new_empty(0)
        return [Match(none, none, none)] * len(points)
    orders = []
    for layer in points:  # a layer at a time: (N, 1, 1, P, 2) against (L, orders, P, 2)
        orders.append(distance(*torch.broadcast_tensors(layer[:, None, None], lines)).min(-1))
    cost = class_cost * class_costs(logits, labels) + line_cost * torch.stack([order.values for order in orders])
    return [Match(i, t, order.indices[i, t]) for (i, t), order in zip(assign(cost), orders)]


def spread_lines(count: int, points: int, sides: tuple[float, float]) -> torch.Tensor:
    """Straight lines (count, points, 2), half as long as the range of `sides` metres, along x and y in turn, through
    places of a grid."""
    columns = math.ceil(math.sqrt(count * sides[0] / sides[1]))
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    x = ((index % columns + 0.5) / columns - 0.5) * sides[0]
    y = ((index // columns + 0.5) / rows - 0.5) * sides[1]
    along = 0.5 * torch.arange(points) / (points - 1) - 0.25
    crosses = (index % 2 == 1)[:, None]
    line_x = x[:, None] + ~crosses * along * sides[0]
    line_y = y[:, None] + crosses * along * sides[1]
    return torch.stack([line_x, line_y], dim=-1)
