"""What the map decoder learns from: instances matched to lines whatever the order of their points."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..detection.matching import Match, classification_loss, matched_rows, mean_over_ranks
from ..polylines import match_lines
from .decoder import MapOutput

LOSS_WEIGHTS = {"cls": 2.0, "points": 5.0, "direction": 0.25}
_CLASS_COST, _LINE_COST = 2.0, 5.0


@dataclass(frozen=True, eq=False)
class MapTruth:
    """What is true of each of B samples."""

    lines: list[torch.Tensor]  # (L, orders, points, 2) float32 metres, ego frame, see `polylines.line_orders`
    labels: list[torch.Tensor]  # (L,) int64

    def to(self, device: torch.device | str) -> "MapTruth":
        return MapTruth(*([x.to(device, non_blocking=True) for x in part] for part in (self.lines, self.labels)))


@dataclass(frozen=True, eq=False)
class MapLosses:
    """Unweighted losses, and the matches of every round and sample."""

    rounds: dict[str, torch.Tensor]  # (rounds,) of each loss: `LOSS_WEIGHTS` has the names
    matches: list[list[Match]]

    @property
    def total(self) -> dict[str, torch.Tensor]:
        """Scalars: means over the rounds, so that early rounds do not drown the last one."""
        return {name: values.mean() for name, values in self.rounds.items()}


def map_losses(output: MapOutput, truth: MapTruth, line_range: tuple[float, float]) -> MapLosses:
    """The losses of MapTR (Liao et al. 2023), each round matched on its own.

    cls: focal loss of all instances; those without a match are background. points: L1 of matched lines in their best
    order, in sides of `line_range`, mean over the points of x and y together. direction: 1 − cosine between the pieces
    of a matched line and those of its truth, mean over the pieces. Each is divided by the number of true lines (mean
    over the ranks), at least 1. Computed in float32; gradients for the output.
    """
    device = output.logits.device
    with torch.autocast(device.type, enabled=False):
        sides = output.points.new_tensor(line_range)
        costs = dict(class_cost=_CLASS_COST, line_cost=_LINE_COST)
        samples = [
            match_lines(
                output.logits[:, sample], output.points[:, sample] / sides, lines / sides, labels, _distance, **costs
            )
            for sample, (lines, labels) in enumerate(zip(truth.lines, truth.labels))
        ]
        matches = [list(layer) for layer in zip(*samples)]
        count = mean_over_ranks([sum(len(labels) for labels in truth.labels)], device)[0]
        losses = {name: [] for name in LOSS_WEIGHTS}
        for logits, points, layer in zip(output.logits, output.points, matches):
            found = points[matched_rows(layer)] / sides  # (M, points, 2)
            target = torch.cat([lines[match.truth, match.order] for lines, match in zip(truth.lines, layer)]) / sides
            pieces = [(line * sides).diff(dim=1) for line in (found, target)]
            turned = 1 - F.cosine_similarity(*pieces, dim=-1, eps=1e-4)
            losses["cls"].append(classification_loss(logits, truth.labels, layer) / count)
            losses["points"].append(_distance(found, target).sum() / count)
            losses["direction"].append(turned.mean(-1).sum() / count)
    return MapLosses({name: torch.stack(values) for name, values in losses.items()}, matches)


def _distance(a, b):
    """L1 of lines (…, points, 2), per point."""
    return (a - b).abs().sum(-1).mean(-1)
