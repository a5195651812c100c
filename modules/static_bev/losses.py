"""Losses of lanes, road and instances. What a source of labels does not know is left out, it is not background."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from ..centres import add_peaks, peak_loss
from .grid import BevGrid
from .head import HeadOutput

LOSSES = ("lane_focal", "lane_dice", "road_focal", "road_dice", "heat", "box")
_GAMMA = 2.0
_LEAST_SHARE = 1e-3  # of the cells that count, below which a loss is not divided by what is true


@dataclass
class StaticTruth:
    """What is true of a batch. Coverage is the share of a cell that is covered, in 255ths."""

    lanes: torch.Tensor  # (B, lanes, rows, columns) uint8 coverage
    unknown_lanes: torch.Tensor  # (B, rows, columns) uint8 coverage of lines whose type nobody knows
    lanes_known: torch.Tensor  # (B, lanes) bool: whether the source knows of this type at all
    road: torch.Tensor  # (B, road classes, rows, columns) uint8 coverage
    road_known: torch.Tensor  # (B, road classes) bool
    instances: list[torch.Tensor]  # B of (G, 6): x, y, length, width, angle, class
    instances_known: torch.Tensor  # (B, instance classes) bool

    def to(self, device: torch.device | str) -> "StaticTruth":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "StaticTruth":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change):
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: [*map(change, x)] if isinstance(x, list) else change(x) for n, x in moved.items()})

    @staticmethod
    def cat(parts: "list[StaticTruth]") -> "StaticTruth":
        """One batch of several, in order."""
        joined = {}
        for field in fields(StaticTruth):
            values = [getattr(part, field.name) for part in parts]
            joined[field.name] = sum(values, []) if isinstance(values[0], list) else torch.cat(values)
        return StaticTruth(**joined)


def static_losses(output: HeadOutput, truth: StaticTruth, grid: BevGrid, turns: torch.Tensor) -> dict:
    """Unweighted scalars: focal loss and Dice of lanes and of road, heat and boxes of instances (see `LOSSES`).

    A cell of a line of unknown type asks for some lane class there, whichever; other cells ask each class that the
    source knows. Coverage between 0 and 1 is a target between 0 and 1.

    Args:
        output: of the head.
        truth: on the same device.
        grid: of the labels.
        turns: what each instance class multiplies its angle by.
    """
    lanes, unknown = truth.lanes.float() / 255, truth.unknown_lanes.float() / 255
    known = truth.lanes_known[:, :, None, None] & (unknown < 0.5)[:, None]
    some = _focal(_any_logit(output.lanes, truth.lanes_known), unknown, unknown >= 0.5)
    road, road_known = truth.road.float() / 255, truth.road_known[:, :, None, None].expand_as(truth.road)
    heat, box = _instance_losses(output, truth, grid, turns)
    return dict(
        lane_focal=_focal(output.lanes, lanes, known) + some,
        lane_dice=_dice(output.lanes, lanes, known),
        road_focal=_focal(output.road, road, road_known),
        road_dice=_dice(output.road, road, road_known),
        heat=heat,
        box=box,
    )


def _any_logit(logits, known):
    """(B, rows, columns), the highest logit of the classes that are known."""
    return logits.masked_fill(~known[:, :, None, None], -30.0).amax(1)


def _focal(logits, target, counts):
    """Focal loss with targets in [0, 1] (Li et al. 2020, "Generalized focal loss"), over the sum of the targets.

    Or over `_LEAST_SHARE` of the cells, where less is true: a batch without any line would outweigh all others.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (target - logits.sigmoid()).abs() ** _GAMMA
    return (loss * counts).sum() / torch.maximum((target * counts).sum(), _LEAST_SHARE * counts.sum()).clamp(min=1.0)


def _dice(logits, target, counts):
    """1 − Dice, the mean over the classes that are there (Sudre et al. 2017, with sums, not sums of squares).

    It is least where a cell says yes as soon as its chance is above half of the Dice, and so asks for sure lines; over
    sums of squares (Milletari et al. 2016) an unsure cell does best with an unsure answer. A class that is not there
    would ask for zeros as loudly as one that is asks for its cells.
    """
    said, true = logits.sigmoid() * counts, target * counts
    axes = (0, 2, 3)
    dice = (2 * (said * true).sum(axes) + 1) / ((said + true).sum(axes) + 1)
    asked = (true.sum(axes) > 0).to(dice)
    return ((1 - dice) * asked).sum() / asked.sum().clamp(min=1)


def _instance_losses(output, truth, grid, turns):
    """CenterNet: the heat's focal loss with a Gaussian round each centre, L1 of the boxes at the centres."""
    target, rows, places = torch.zeros_like(output.heat), [], []
    for sample, boxes in enumerate(truth.instances):
        cells = grid.cells(boxes[:, :2].double())
        u, v = cells.round().long().unbind(-1)
        inside = (u >= 0) & (u < grid.columns) & (v >= 0) & (v < grid.rows)
        boxes, cells, u, v = boxes[inside], cells[inside], u[inside], v[inside]
        label = boxes[:, 5].long()
        add_peaks(target[sample], cells.round(), label, boxes[:, 2:4].amin(1) / grid.size)
        angle = boxes[:, 4] * turns[label]
        offset = (cells - cells.round()).to(boxes)
        rows.append(torch.cat([offset, boxes[:, 2:4].log(), angle.sin()[:, None], angle.cos()[:, None]], dim=1))
        places.append(torch.stack([torch.full_like(u, sample), v, u], dim=1))
    rows, places = torch.cat(rows), torch.cat(places)
    heat = peak_loss(output.heat, target, truth.instances_known[:, :, None, None])
    said = output.boxes[places[:, 0], :, places[:, 1], places[:, 2]]
    return heat, (said - rows).abs().sum() / max(len(rows), 1)
