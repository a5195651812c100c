"""Average precision of boxes whatever their class: whether things are found, where the class is hard to tell."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .map import ranked_precision
from .pooling import SampleResults

THRESHOLDS = (1.0, 2.0, 4.0)  # metres from centre to centre up to which a box counts
FIGURES = tuple(f"AP/any@{metres:g}" for metres in THRESHOLDS)


class AnyClassMetric(SampleResults):
    """One of `FIGURES` for each of `THRESHOLDS`, pooled over samples; 0 where there is nothing to find.

    Said and true boxes of a sample are paired by the distance of their centres on the ground, the best score first,
    each with the nearest that is free.

    Args:
        reach: metres from the ego frame's origin within which boxes count, said and true ones.
    """

    def __init__(self, reach: float):
        super().__init__(reach=reach)

    def add(self, token: str, centres: torch.Tensor, scores: torch.Tensor, true: torch.Tensor) -> None:
        """Adds one sample: centres (K, 2 or more) with their scores (K,), true centres (G, 2 or more), metres. Boxes at
        one and the same place, which a query says for several classes, count once, with the best score."""
        centres, scores, true = (values.detach().cpu().double() for values in (centres[:, :2], scores, true[:, :2]))
        true = true[true.norm(dim=1) < self.settings["reach"]]
        best = {}
        for index in scores.argsort(descending=True, stable=True).tolist():
            if centres[index].norm() < self.settings["reach"]:
                best.setdefault(tuple(centres[index].tolist()), index)
        own = list(best.values())
        apart = torch.cdist(centres[own], true)
        hits = [_greedy(apart, metres) for metres in THRESHOLDS]
        self.samples.setdefault(token, (scores[own].tolist(), hits, len(true)))

    def compute(self) -> dict[str, float]:
        samples = self.in_order()
        objects = sum(count for _, _, count in samples)
        if not objects:
            return dict.fromkeys(FIGURES, 0.0)
        scores = np.array([score for own, _, _ in samples for score in own])
        found = {}
        for place, name in enumerate(FIGURES):
            right = np.array([hit for _, hits, _ in samples for hit in hits[place]], dtype=bool)
            found[name] = ranked_precision(scores, right, objects)
        return found


def _greedy(apart: torch.Tensor, metres: float) -> Sequence[bool]:
    """Whether each row of distances (N, G), best first, gets the nearest free column, closer than so many metres."""
    free, hits = apart.clone(), []
    for row in free.unbind():
        hit = row.numel() > 0 and float(row.min()) < metres
        if hit:
            free[:, row.argmin()] = math.inf
        hits.append(hit)
    return hits
