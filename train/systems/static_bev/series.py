"""Series evaluation of lane markings, pooled IoU of maps, and average precision of instances.

Every metric keeps counts by sample and pools them over the split, so shares of several ranks give the same figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import maximum_filter1d
from scipy.spatial import cKDTree

from ....kernels.runtime.extras import optional
from ....modules.static_bev.grid import BevGrid
from ....modules.static_bev.rotated import rotated_iou
from ...metrics.map import average_precision
from ...metrics.pooling import SampleResults

shapely = optional("train", "shapely")

CONFIDENCES = (0.9, 0.85, 0.8, 0.75, 0.7)
NEAR_ENOUGH = 0.25  # metres from a line, and from an instance's centre
SPACING = 0.1  # metres between the samples of a true line
NEIGHBOURS = 2  # cells on each side among which a ridge is the highest
OTHER, ANY = "Other", "any"  # lines whose type nobody knows; lines of whatever type
# Where lines are looked at: (left, right, back, front) in metres, as the documents write it; y is −left … right.
RANGES = {
    "all": (-22.4, 22.4, -20.8, 62.4),
    "main": (-8.0, 8.0, -20.0, 120.0),
    "near": (-22.4, 22.4, 0.0, 30.0),
    "middle": (-22.4, 22.4, 30.0, 60.0),
    "far": (-22.4, 22.4, 60.0, 120.0),
}
_MATCHED_TRUE, _TRUE, _MATCHED, _SAID, _ERROR, _RIGHT_TYPE = range(6)  # what is counted


@dataclass(frozen=True)
class SeriesFigures:
    """What is said of one sub-class in one range at one confidence; None = there is nothing to say it of."""

    recall: float | None
    precision: float | None
    f1: float | None
    error: float | None  # metres between what matched and its line, mean
    type_accuracy: float | None  # of what matched, sub-class `ANY` only
    support: float  # metres of true lines


class SeriesMetric(SampleResults):
    """How well predicted cells follow the true lines.

    For a frame, sub-class, confidence t and range: the truth is the true lines within range and grid, sampled every
    0.1 m. The prediction is the cells with probability ≥ t that are ridges: the maximum of their row or column
    neighbourhood (± 2 cells). Recall is the share of the samples that have a ridge within 0.25 m, precision the share
    of the ridges within 0.25 m of a line. Counts of all frames are added, then divided.

    `ANY` takes the most probable class of each cell against all lines; lines of unknown type count there and as
    `OTHER`, which has a recall only, as no prediction says "other".

    Args:
        grid: of the predictions.
        classes: sub-classes, in the order of the predictions' channels.
        confidences, ranges: see above.
    """

    def __init__(
        self,
        grid: BevGrid,
        classes: Sequence[str],
        confidences: Sequence[float] = CONFIDENCES,
        ranges: Mapping[str, tuple[float, float, float, float]] = RANGES,
    ):
        super().__init__(
            grid=grid, classes=tuple(classes), confidences=tuple(confidences), ranges=tuple(sorted(ranges.items()))
        )
        self.boxes = {name: _clipped(grid, limits) for name, limits in ranges.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All sub-classes that figures are for."""
        return (*self.settings["classes"], OTHER, ANY)

    def add(self, token: str, probability: np.ndarray, lines: Sequence[np.ndarray], labels: Sequence[int]) -> None:
        """Adds one frame.

        Args:
            token: of the sample.
            probability: (classes, rows, columns).
            lines: true lines, each (N, 2) in metres, ego frame.
            labels: the class of each; −1 = unknown.

        Raises:
            ValueError: shapes or labels do not fit.
        """
        grid, classes = self.settings["grid"], self.settings["classes"]
        probability, labels = np.asarray(probability), np.asarray(labels, dtype=np.int64).reshape(-1)
        if probability.shape != (len(classes), *grid.shape) or len(lines) != len(labels):
            needed = f"({len(classes)}, {grid.rows}, {grid.columns}) and a label for each line"
            raise ValueError(f"SeriesMetric.add: {probability.shape} with {len(lines)} lines, needs {needed}")
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"SeriesMetric.add: labels from {labels.min()} to {labels.max()}; {len(classes)} classes")
        counts = np.zeros((len(self.names), len(self.boxes), len(self.settings["confidences"]), 6))
        box = shapely.box(grid.x[0], grid.y[0], grid.x[1], grid.y[1])
        truth = [_lines_within(line, box) for line in lines]
        types = np.concatenate([np.full(len(pieces), label) for pieces, label in zip(truth, labels)] or [np.empty(0)])
        truth = np.array([piece for pieces in truth for piece in pieces], dtype=object)
        best = probability.argmax(0)
        for place, name in enumerate(self.names):
            if name in (ANY, OTHER):
                own, scores = truth if name == ANY else truth[types == -1], probability.max(0)
            else:
                own, scores = truth[types == place], probability[place]
            self._count(counts[place], own, scores, best if name == ANY else None, truth, types, name != OTHER)
        self.samples.setdefault(token, counts)

    def _count(self, counts, own, scores, best, truth, types, has_precision):
        """Fills (ranges, confidences, 6) for one sub-class of one frame."""
        grid, confidences = self.settings["grid"], self.settings["confidences"]
        v, u = np.nonzero(ridges(scores, min(confidences)))
        centres = grid.points(torch.from_numpy(np.stack([u, v], axis=1)).double()).numpy()
        sure, samples = scores[v, u], _samples(own)
        away = np.full(len(centres), np.inf)
        if len(own):
            away = shapely.distance(shapely.points(centres), shapely.multilinestrings(list(own)))
        right = np.zeros(len(centres), dtype=bool)
        if best is not None and len(own) and len(centres):
            right = types[shapely.STRtree(truth).nearest(shapely.points(centres))] == best[v, u]
        for row, box in zip(counts, self.boxes.values()):
            if box is None:
                continue
            seen, there = _inside(samples, box), _inside(centres, box)
            for cell, confidence in zip(row, confidences):
                said = there & (sure >= confidence)
                cell[_TRUE] = seen.sum()
                if said.any() and seen.any():
                    found = cKDTree(centres[sure >= confidence]).query(samples[seen], distance_upper_bound=1.0)[0]
                    cell[_MATCHED_TRUE] = (found <= NEAR_ENOUGH).sum()
                if has_precision:
                    matched = said & (away <= NEAR_ENOUGH)
                    cell[_SAID], cell[_MATCHED], cell[_ERROR] = said.sum(), matched.sum(), away[matched].sum()
                    cell[_RIGHT_TYPE] = (matched & right).sum()

    def figures(self) -> dict[tuple[str, str, float], SeriesFigures]:
        """(sub-class, range, confidence) → figures, pooled over all frames."""
        shape = (len(self.names), len(self.boxes), len(self.settings["confidences"]), 6)
        sums, result = sum(self.in_order(), np.zeros(shape)), {}
        for i, name in enumerate(self.names):
            for j, place in enumerate(self.boxes):
                for k, confidence in enumerate(self.settings["confidences"]):
                    result[name, place, confidence] = _figures(sums[i, j, k], name)
        return result

    def compute(self) -> dict[str, float | None]:
        """F1 of each sub-class in range "all", the mean over the confidences, and `series/f1`, the mean over the
        sub-classes that have any support; `series/f1_any`, `series/error` and `series/type` of lines of any type."""
        figures, confidences = self.figures(), self.settings["confidences"]
        result = {}
        for name in (*self.settings["classes"], ANY):
            values = [figures[name, "all", confidence].f1 for confidence in confidences]
            result[f"series/f1/{name}"] = None if None in values else float(np.mean(values))
        own = [result[f"series/f1/{name}"] for name in self.settings["classes"]]
        own = [value for value in own if value is not None]
        least = figures[ANY, "all", min(confidences)]
        return {
            "series/f1": float(np.mean(own)) if own else None,
            "series/f1_any": result[f"series/f1/{ANY}"],
            "series/error": least.error,
            "series/type": least.type_accuracy,
        } | result


def ridges(scores: np.ndarray, threshold: float) -> np.ndarray:
    """(rows, columns) bool: cells at `threshold` or above that are the maximum of their row or column neighbourhood."""
    mask = scores >= threshold
    inside = np.where(mask, scores, -np.inf)
    highest = (maximum_filter1d(inside, 2 * NEIGHBOURS + 1, axis=axis, mode="nearest") for axis in (0, 1))
    return mask & np.logical_or(*(inside == value for value in highest))


class MapIou(SampleResults):
    """Intersection over union of maps, pooled over the split.

    Args:
        classes: names of the channels.
        threshold: probability from which on a cell counts as said.
    """

    STEPS = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2).tolist())  # thresholds among which the best is looked for

    def __init__(self, classes: Sequence[str], threshold: float):
        super().__init__(classes=tuple(classes), threshold=threshold)

    def add(self, token: str, probability: torch.Tensor, truth: torch.Tensor, known: torch.Tensor) -> None:
        """Adds one frame.

        Args:
            token: of the sample.
            probability: (classes, rows, columns).
            truth: the same shape, bool.
            known: the same shape, bool; what is not known does not count.
        """
        rows = []
        for threshold in (self.settings["threshold"], *self.STEPS):
            said = (probability >= threshold) & known
            true = truth & known
            rows.append(torch.stack([(said & true).sum((1, 2)), (said | true).sum((1, 2))]))
        self.samples.setdefault(token, torch.stack(rows).cpu().numpy())  # (thresholds, 2, classes)

    def compute(self) -> dict[str, float | None]:
        """`iou/CLASS` at the fixed threshold, `iou_best/CLASS` at the threshold that suits the split best, and the
        means `iou` and `iou_best` over the classes; one that is nowhere, and nowhere said, has none."""
        sums = sum(self.in_order(), np.zeros((1 + len(self.STEPS), 2, len(self.settings["classes"]))))
        result = {}
        for place, name in enumerate(self.settings["classes"]):
            values = [float(i / u) if u else None for i, u in sums[:, :, place]]
            result[f"iou/{name}"] = values[0]
            result[f"iou_best/{name}"] = max((value for value in values[1:] if value is not None), default=None)
        for kind in ("iou", "iou_best"):
            own = [v for n, v in result.items() if n.startswith(f"{kind}/") and v is not None]
            result[kind] = float(np.mean(own)) if own else None
        return result


class InstanceMetric(SampleResults):
    """Average precision of instances: by centre within 0.25 m, and by rotated IoU of 0.5 and 0.7, pooled over samples.

    A prediction is right if its nearest true one of its class is near enough and no better-scored prediction has
    claimed that.

    Args:
        classes: their names.
    """

    KINDS = {"centre": (0, NEAR_ENOUGH), "iou50": (1, 0.5), "iou70": (1, 0.3)}  # which distance, up to what

    def __init__(self, classes: Sequence[str]):
        super().__init__(classes=tuple(classes))

    def add(self, token: str, boxes, scores, true_boxes, known: Sequence[bool]) -> None:
        """Adds one frame: boxes (P, 6) and (G, 6) as (x, y, length, width, yaw, class) and scores (P,), all on the CPU,
        and which classes anybody knows of."""
        result = []
        for label in range(len(self.settings["classes"])):
            if not known[label]:
                result.append(None)
                continue
            own, true = boxes[boxes[:, 5] == label], true_boxes[true_boxes[:, 5] == label]
            apart = torch.cdist(own[:, :2].double(), true[:, :2].double())
            pair = [_nearest(distance) for distance in (apart, 1 - rotated_iou(own[:, :5], true[:, :5]))]
            result.append((scores[boxes[:, 5] == label].numpy(), *pair, len(true)))
        self.samples.setdefault(token, result)

    def compute(self) -> dict[str, float | None]:
        """`ap/KIND/CLASS`, and `ap/KIND`, the mean over the classes that have a true instance."""
        figures = {}
        for kind, (place, reach) in self.KINDS.items():
            values = []
            for label, name in enumerate(self.settings["classes"]):
                samples = [sample[label] for sample in self.in_order() if sample[label] is not None]
                total = sum(sample[3] for sample in samples)
                rows = [(sample[0], *sample[1 + place], sample[3]) for sample in samples]
                figures[f"ap/{kind}/{name}"] = average_precision(rows, reach + 1e-9, total) if rows else None
                values += [figures[f"ap/{kind}/{name}"]] if total else []
            figures[f"ap/{kind}"] = float(np.mean(values)) if values else None
        return figures


def _nearest(distance: torch.Tensor):
    if not distance.numel():
        return np.zeros(len(distance), np.int64), np.full(len(distance), np.inf)
    low, place = distance.min(dim=1)
    return place.numpy(), low.numpy()


def _figures(counts, name):
    share = lambda part, whole: float(part / whole) if whole else None  # noqa: E731
    matched_true, true, matched, said, error, right = counts
    recall = share(matched_true, true)
    precision = share(matched, said) if name != OTHER else None
    f1 = None
    if name != OTHER and recall is not None:
        f1 = 2 * recall * precision / (recall + precision) if recall and precision else 0.0
    types = share(right, matched) if name == ANY else None
    return SeriesFigures(recall, precision, f1, share(error, matched), types, float(true * SPACING))


def _clipped(grid, limits):
    """(x low, x high, y low, y high) of a range within the grid; None where nothing is left."""
    left, right, back, front = limits
    low, high = max(back, grid.x[0]), min(front, grid.x[1])
    side, other = max(left, grid.y[0]), min(right, grid.y[1])
    return (low, high, side, other) if low < high and side < other else None


def _inside(points, box):
    low, high, side, other = box
    return (points[:, 0] >= low) & (points[:, 0] < high) & (points[:, 1] >= side) & (points[:, 1] < other)


def _lines_within(line, box):
    """The pieces of a polyline within a box."""
    parts = shapely.get_parts(shapely.intersection(shapely.LineString(line), box))
    return [part for part in parts if part.geom_type == "LineString" and part.length > 0]


def _samples(lines):
    """(N, 2) points along lines, `SPACING` apart, each in the middle of its piece."""
    points = [np.empty((0, 2))]
    for line in lines:
        count = max(round(line.length / SPACING), 1)
        along = (np.arange(count) + 0.5) / count
        points.append(shapely.get_coordinates(shapely.line_interpolate_point(line, along, normalized=True)))
    return np.concatenate(points)
