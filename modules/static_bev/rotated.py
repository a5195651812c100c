"""Rectangles that are turned: how far they overlap, and which of several that overlap stays."""

import torch

_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # corners, counter-clockwise
_TOUCH = 1e-9  # relative; a corner so near to an edge lies on it


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes (…, 5) as (x, y, length, width, yaw), yaw counter-clockwise in radians → (…, 4, 2), counter-clockwise."""
    x, y, length, width, yaw = boxes.unbind(-1)
    cos, sin = yaw.cos()[..., None], yaw.sin()[..., None]
    signs = boxes.new_tensor(_SIGNS) / 2
    along, across = length[..., None] * signs[:, 0], width[..., None] * signs[:, 1]
    return torch.stack([x[..., None] + cos * along - sin * across, y[..., None] + sin * along + cos * across], dim=-1)


def rotated_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every pair, in float64: boxes (N, 5), others (M, 5) → (N, M). No gradient.

    The common part of two rectangles is convex. Its corners are those of each that lie within the other, and the
    points where edges cross; in the order of their direction from the middle they give its area.
    """
    boxes, others = boxes.detach().double(), others.detach().double()
    if not len(boxes) or not len(others):
        return boxes.new_zeros(len(boxes), len(others))
    middle = others[:, :2].mean(0)  # nearness to zero keeps differences of products exact
    boxes, others = (torch.cat([b[:, :2] - middle, b[:, 2:]], dim=1) for b in (boxes, others))
    a, b = corners(boxes)[:, None], corners(others)[None]  # (N, 1, 4, 2), (1, M, 4, 2)
    a, b = a.expand(-1, len(others), -1, -1), b.expand(len(boxes), -1, -1, -1)
    crossings, crossed = _crossings(a, b)
    points = torch.cat([a, b, crossings], dim=2)  # (N, M, 24, 2)
    valid = torch.cat([_within(a, b), _within(b, a), crossed], dim=2)
    area = _area(points, valid)
    sizes = boxes[:, 2] * boxes[:, 3], others[:, 2] * others[:, 3]
    union = sizes[0][:, None] + sizes[1] - area
    return torch.where(union > 0, area / union.clamp(min=torch.finfo(area.dtype).tiny), 0.0).clamp(0, 1)


def rotated_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Keeps the best of boxes that overlap by more than `threshold`.

    Args:
        boxes: (N, 5), see `corners`.
        scores: (N,); of equal ones the first wins. A score that is not finite is dropped.
        threshold: intersection over union.

    Returns:
        (K,) int64, places of those that stay, the best first.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order].isfinite()]
    overlap = (rotated_iou(boxes[order], boxes[order]) > threshold).cpu()
    kept, alive = [], torch.ones(len(order), dtype=torch.bool)
    for place in range(len(order)):
        if alive[place]:
            kept.append(place)
            alive &= ~overlap[place]
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def _cross(a, b):
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _within(points, box):
    """(N, M, 4) bool: which corners lie in or on the box, which runs counter-clockwise."""
    edges = box.roll(-1, dims=2) - box
    away = points[:, :, :, None] - box[:, :, None]  # (N, M, 4 points, 4 edges, 2)
    side = _cross(edges[:, :, None], away)
    return (side >= -_TOUCH * (1 + edges.square().sum(-1)[:, :, None])).all(-1)


def _crossings(a, b):
    """(N, M, 16, 2) and (N, M, 16) bool: where edges cross, and whether they do; parallel ones do not."""
    start, other = a[:, :, :, None], b[:, :, None]  # (N, M, 4, 1, 2), (N, M, 1, 4, 2)
    along, beside = (x.roll(-1, dims=2) - x for x in (a, b))
    along, beside = along[:, :, :, None], beside[:, :, None]
    across = _cross(along, beside)
    parallel = across.abs() <= _TOUCH * along.norm(dim=-1) * beside.norm(dim=-1)
    across = torch.where(parallel, 1.0, across)
    on_a, on_b = _cross(other - start, beside) / across, _cross(other - start, along) / across
    crossed = ~parallel & (on_a >= 0) & (on_a <= 1) & (on_b >= 0) & (on_b <= 1)
    return (start + on_a[..., None] * along).flatten(2, 3), crossed.flatten(2, 3)


def _area(points, valid):
    """(N, M) area of the convex polygons whose corners are those points (N, M, K, 2) that are valid."""
    count = valid.sum(-1, keepdim=True)
    middle = (points * valid[..., None]).sum(2, keepdim=True) / count.clamp(min=1)[..., None]
    points = torch.where(valid[..., None], points - middle, 0.0)
    angle = torch.where(valid, torch.atan2(points[..., 1], points[..., 0]), torch.inf)
    order = angle.argsort(dim=-1)
    points = points.gather(2, order[..., None].expand_as(points))
    # Places behind the last corner repeat the first one, so they close the polygon and add nothing.
    last = torch.arange(points.shape[2], device=points.device) >= count
    points = torch.where(last[..., None], points[:, :, :1], points)
    return _cross(points, points.roll(-1, dims=2)).sum(-1) / 2
