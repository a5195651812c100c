"""What the driving head learns from: matched boxes and lines, futures of matched agents, the way that was driven."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..detection.losses import focal_loss
from ..detection.matching import (
    Match,
    assign,
    class_costs,
    classification_loss,
    matched_rows,
    mean_over_ranks,
)
from ..polylines import match_lines
from ..settings import Share
from . import boxes
from .decoder import InstanceOutput
from .head import DriveOutput, HeadConfig
from .motion import MotionOutput

LOSS_WEIGHTS = {  # SparseDrive small's
    "det_cls": 2.0,
    "det_box": 0.25,
    "det_centredness": 1.0,
    "det_yawness": 1.0,
    "map_cls": 1.0,
    "map_line": 10.0,
    "motion_cls": 0.2,
    "motion_reg": 0.2,
    "plan_cls": 0.5,
    "plan_reg": 1.0,
    "plan_status": 1.0,
    "depth": 0.2,
}
_REGRESSED = 10  # numbers of a box that truth has: all but the vertical velocity
_BOX_COST = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)  # of these numbers, when boxes are matched …
_BOX_WEIGHTS = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # … and when they are compared
_CONE = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # of a class that has no yaw, times the above
_COSTS = dict(det_cls=2.0, det_box=0.25, map_cls=1.0, map_line=10.0)
_BETA = 0.01  # of the lines' smooth L1, in the range's sides


@dataclass
class DriveTruth:
    """What is true of each of B samples, in the ego frame of its moment. Unknown numbers are NaN."""

    boxes: list[torch.Tensor]  # (G, 9) float32: x, y, z, length, width, height, yaw, vx, vy
    labels: list[torch.Tensor]  # (G,) int64
    lines: list[torch.Tensor]  # (L, orders, points, 2) float32 metres, see `polylines.line_orders`
    line_labels: list[torch.Tensor]  # (L,) int64
    futures: list[torch.Tensor] | None = None  # (G, steps, 2) float32 metres, each from the one before
    future_known: list[torch.Tensor] | None = None  # (G, steps) bool
    ego_future: torch.Tensor | None = None  # (B, plan steps, 2) float32 metres, each from the one before
    ego_future_known: torch.Tensor | None = None  # (B, plan steps) bool
    command: torch.Tensor | None = None  # (B,) int64, place in `motion.COMMANDS`
    ego_status: torch.Tensor | None = None  # (B, 10) float32


@dataclass
class LossConfig:
    box_threshold: Share = 0.05  # a matched instance less sure than this does not learn where its target is
    no_direction: tuple[str, ...] = ("barrier",)  # classes whose front is as good as their back
    no_yaw: tuple[str, ...] = ("traffic_cone",)


@dataclass(frozen=True, eq=False)
class DriveLosses:
    """Unweighted losses, and the matches of every layer and sample."""

    layers: dict[str, torch.Tensor]  # (layers,) of each loss: `LOSS_WEIGHTS` has the names
    boxes: list[list[Match]]
    lines: list[list[Match]]

    @property
    def total(self) -> dict[str, torch.Tensor]:
        """Scalars: sums over the layers."""
        return {name: values.sum() for name, values in self.layers.items()}


def drive_losses(
    output: DriveOutput, truth: DriveTruth, head: HeadConfig, config: LossConfig | None = None
) -> DriveLosses:
    """The losses of SparseDrive (Sun et al. 2024), each layer matched on its own; `head` is the head's configuration.

    det_cls, map_cls: focal loss of all instances; those without a match are background. det_box: weighted L1 of matched
    boxes; det_centredness, det_yawness: whether they tell how far off and which way round they are. map_line: smooth L1
    of matched lines in their best order. motion_*, plan_*: of the modes the one nearest to what happened learns the
    steps, and all learn which it is. plan_status: L1. Divided by the number of truths (mean over the ranks), at least
    1; plans by the number of samples. Unknown numbers of the truth contribute nothing, and truth whose place or size is
    unknown has no match. Motion and plan are absent where the head has no motion. Computed in float32, under autocast
    too; gradients for the output.
    """
    config = config or LossConfig()
    truth = _usable(truth)
    device = output.detection.logits.device
    with torch.autocast(device.type, enabled=False):
        rules = _BoxRules(
            config.box_threshold, _places(config.no_direction, head.classes), _places(config.no_yaw, head.classes)
        )
        sides = output.lines.anchors.new_tensor(head.line_range)
        found = [_match_boxes(output.detection, truth, rules), _match_lines(output.lines, truth, sides)]
        counts = mean_over_ranks([sum(len(m.instance) for m in matches[-1]) for matches in found], device)
        losses = _box_losses(output.detection, truth, found[0], counts[0], rules)
        losses |= _line_losses(output.lines, truth, found[1], counts[1], sides, config.box_threshold)
        if output.motion is not None:
            losses |= _motion_losses(output.motion, truth, found[0][-1], counts[0])
            losses |= _plan_losses(output.motion, truth)
    return DriveLosses(losses, *found)


class _BoxRules(NamedTuple):
    threshold: float
    no_direction: list[int]  # labels
    no_yaw: list[int]


def _places(names, classes):
    return [classes.index(name) for name in names if name in classes]


def _is_one_of(label, labels):
    return torch.isin(label, torch.tensor(labels, dtype=label.dtype, device=label.device))


def _usable(truth):
    """Without the boxes whose place or size is not known."""
    good = [box[:, :7].isfinite().all(1) & (box[:, 3:6] > 0).all(1) for box in truth.boxes]
    if all(bool(keep.all()) for keep in good):
        return truth
    per_box = ("boxes", "labels", "futures", "future_known")
    lists = {name: getattr(truth, name) for name in per_box}
    kept = {n: None if v is None else [t[keep] for t, keep in zip(v, good)] for n, v in lists.items()}
    return DriveTruth(**{**vars(truth), **kept})


def _match_boxes(detection: InstanceOutput, truth: DriveTruth, rules: _BoxRules) -> list[list[Match]]:
    """[layer][sample]."""
    cost_weights = detection.anchors.new_tensor(_BOX_COST)
    samples = []
    for sample, (box, label) in enumerate(zip(truth.boxes, truth.labels)):
        target, weights = boxes.encode(box), _class_weights(label, rules) * cost_weights
        with torch.no_grad():
            classification = class_costs(detection.logits[:, sample], label)
            error = detection.anchors[:, sample, :, None, :_REGRESSED] - target
            error = torch.where(target.isfinite(), error, 0).abs() * weights
            cost = _COSTS["det_cls"] * classification + _COSTS["det_box"] * error.sum(-1)
        samples.append([Match(*pair) for pair in assign(cost)])
    return [list(layer) for layer in zip(*samples)]


def _class_weights(label, rules):
    """(G, 10): what truth of a class says of a box."""
    cone = torch.tensor(_CONE, device=label.device)
    return torch.where(_is_one_of(label, rules.no_yaw)[:, None], cone, 1.0)


def _box_losses(detection, truth, matches, count, rules):
    losses = {name: [] for name in ("det_cls", "det_box", "det_centredness", "det_yawness")}
    weights = detection.anchors.new_tensor(_BOX_WEIGHTS)
    targets = [boxes.encode(box) for box in truth.boxes]
    for logits, anchors, quality, layer in zip(detection.logits, detection.anchors, detection.quality, matches):
        losses["det_cls"].append(classification_loss(logits, truth.labels, layer) / count)
        sample, instance = matched_rows(layer)
        sure = logits[sample, instance].amax(-1).sigmoid() > rules.threshold
        target = torch.cat([t[m.truth] for t, m in zip(targets, layer)])[sure]
        label = torch.cat([t[m.truth] for t, m in zip(truth.labels, layer)])[sure]
        predicted = anchors[sample[sure], instance[sure], :_REGRESSED]
        turned_round = (boxes.cosine_of_yaw(target, predicted) < 0) & _is_one_of(label, rules.no_direction)
        yaw = torch.where(turned_round[:, None], -target[:, boxes.YAW], target[:, boxes.YAW])
        target = torch.cat([target[:, :6], yaw, target[:, 8:]], dim=1)
        error = torch.where(target.isfinite(), predicted - target, 0).abs()
        losses["det_box"].append((error * weights * _class_weights(label, rules)).sum() / count)
        centredness, yawness = quality[sample[sure], instance[sure]].unbind(-1)
        distance = (target[:, :3] - predicted[:, :3]).norm(dim=-1)
        near = F.binary_cross_entropy_with_logits(centredness, (-distance).exp(), reduction="sum")
        losses["det_centredness"].append(near / count)
        right = boxes.cosine_of_yaw(target, predicted) > 0
        wrong = torch.where(right, -yawness, yawness)
        losses["det_yawness"].append((wrong.sigmoid().square() * F.softplus(wrong)).sum() / count)
    return {name: torch.stack(values) for name, values in losses.items()}


def _normalised(points, sides):
    """Points in metres in the sides of the range, 0 to 1."""
    return (points + sides / 2) / (sides + 1e-5)


def _line_distance(a, b):
    """Of normalised lines (…, points, 2): smooth L1, per point."""
    return F.smooth_l1_loss(a, b, reduction="none", beta=_BETA).sum((-2, -1)) / a.shape[-2]


def _match_lines(lines: InstanceOutput, truth: DriveTruth, sides) -> list[list[Match]]:
    costs = dict(class_cost=_COSTS["map_cls"], line_cost=_COSTS["map_line"])
    samples = []
    for sample, (line, label) in enumerate(zip(truth.lines, truth.line_labels)):
        predicted = _normalised(lines.anchors[:, sample].unflatten(-1, (-1, 2)), sides)
        pair = predicted, _normalised(line, sides)
        samples.append(match_lines(lines.logits[:, sample], *pair, label, _line_distance, **costs))
    return [list(layer) for layer in zip(*samples)]


def _line_losses(lines, truth, matches, count, sides, threshold):
    losses = dict(map_cls=[], map_line=[])
    for logits, anchors, layer in zip(lines.logits, lines.anchors, matches):
        losses["map_cls"].append(classification_loss(logits, truth.line_labels, layer) / count)
        sample, instance = matched_rows(layer)
        sure = logits[sample, instance].amax(-1).sigmoid() > threshold
        target = torch.cat([line[m.truth, m.order] for line, m in zip(truth.lines, layer)])[sure]
        predicted = anchors[sample[sure], instance[sure]].unflatten(-1, (-1, 2))
        pair = _normalised(predicted, sides), _normalised(target, sides)
        losses["map_line"].append(_line_distance(*pair).sum() / count)
    return {name: torch.stack(values) for name, values in losses.items()}


def _motion_losses(motion: MotionOutput, truth: DriveTruth, layer: list[Match], count):
    """Of the agents that the last layer matched."""
    target, known = [], []
    for match, future, mask in zip(layer, truth.futures, truth.future_known):
        target.append(future[match.truth])
        known.append(mask[match.truth])
    sample, instance = matched_rows(layer)
    logits, steps = motion.logits[sample, instance], motion.steps[sample, instance]
    classification, regression = _winner_takes_all(logits, steps, torch.cat(target), torch.cat(known).bool())
    return dict(motion_cls=classification.sum()[None] / count, motion_reg=regression.sum()[None] / count)


def _plan_losses(motion: MotionOutput, truth: DriveTruth):
    """Of the plans for the command that was given. Means over samples, modes, steps and coordinates."""
    rows = torch.arange(len(truth.command), device=truth.command.device)
    logits, steps = motion.plan_logits[rows, truth.command], motion.plan_steps[rows, truth.command]
    known = truth.ego_future_known.bool()
    classification, regression = _winner_takes_all(logits, steps, truth.ego_future, known, cumulate=False)
    status = torch.where(truth.ego_status.isfinite(), motion.status - truth.ego_status, 0).abs()
    return dict(
        plan_cls=classification.mean()[None],
        plan_reg=regression.mean()[None],
        plan_status=status.mean()[None],
    )


def _winner_takes_all(logits, steps, target, known, cumulate=True):
    """The mode nearest to what happened.

    logits (M, modes), steps (M, modes, T, 2), target (M, T, 2), known (M, T) → what the modes' scores cost (M, modes),
    nothing where nothing is known, and what the nearest mode's steps cost (M, T, 2), the places with `cumulate`.
    """
    target = torch.where(known[..., None], target, 0)
    places, places_target = steps.cumsum(-2), target.cumsum(-2)
    distance = (places.detach() - places_target[:, None]).norm(dim=-1) * known[:, None]
    nearest = distance.mean(-1).argmin(-1)
    one_hot = nearest[:, None] == torch.arange(logits.shape[1], device=logits.device)
    classification = focal_loss(logits, one_hot) * known.any(-1, keepdim=True)
    rows = torch.arange(len(nearest), device=nearest.device)
    error = (places[rows, nearest] - places_target) if cumulate else (steps[rows, nearest] - target)
    return classification, error.abs() * known[..., None]
