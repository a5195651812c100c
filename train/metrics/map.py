"""Average precision of map lines by Chamfer distance, as StreamMapNet and SparseDrive define it."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

from ..data.map_truth import MAP_CLASSES
from .pooling import SampleResults

THRESHOLDS = (0.5, 1.0, 1.5)  # metres, for 60 × 30 m
HARD_THRESHOLDS = (0.2, 0.5, 1.0)
WIDE_THRESHOLDS = (1.0, 1.5, 2.0)  # for 100 × 50 m
POINTS = 200  # of a line that is compared


class MapMetric(SampleResults):
    """Map AP, pooled over samples.

    A prediction is compared with its nearest true line of its class and sample, by Chamfer distance between
    `POINTS` points of each, and is right if that is within the threshold and no better-scored prediction has claimed
    the same line: one that comes second is wrong even if another line would be near enough. Predictions of all samples
    are then sorted by score (ties by sample token, then by place), and AP is the area under the precision envelope.

    Args:
        classes: their names, in the order of the labels.
        reach: metres, the largest threshold that `compute` will be asked for; farther lines are not measured.
    """

    def __init__(self, classes: Sequence[str] = MAP_CLASSES, reach: float = max(WIDE_THRESHOLDS)):
        super().__init__(classes=tuple(classes), reach=reach)

    def add(self, token: str, lines, labels, scores, true_lines, true_labels) -> None:
        """Adds one sample; arrays or CPU tensors.

        Args:
            token: of the sample.
            lines: the P predicted lines, each (N, 2) in metres, N ≥ 1, in any frame that the true ones share. One that
                is not finite is wrong at every threshold.
            labels: (P,) places in `classes`.
            scores: (P,) finite.
            true_lines, true_labels: the G true lines, each (M, 2) and finite, and their classes. A closed line repeats
                its first point.

        Raises:
            ValueError: numbers that do not fit, a label out of range, a score or a true line that is not finite.
        """
        classes, reach = self.settings["classes"], self.settings["reach"]
        lines, labels = _checked(lines, labels, len(classes), "lines", "labels")
        true_lines, true_labels = _checked(true_lines, true_labels, len(classes), "true_lines", "true_labels")
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != labels.shape or not np.isfinite(scores).all():
            raise ValueError(f"MapMetric.add: scores have shape {scores.shape}, need {labels.shape} finite numbers")
        if not np.isfinite(true_lines).all():
            raise ValueError(f"MapMetric.add: a true line of sample {token} is not finite")
        result = []
        for label in range(len(classes)):
            own, true = lines[labels == label], true_lines[true_labels == label]
            nearest, distance = _nearest(chamfer_distances(own, true, reach))
            result.append((scores[labels == label], nearest, distance, len(true)))
        self.samples.setdefault(token, result)

    def compute(self, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float | None]:
        """mAP, AP/CLASS (mean over the thresholds) and AP/CLASS@THRESHOLD, each in [0, 1].

        A class without a true line in any sample has no AP (None), and the mean is over the others.

        Raises:
            ValueError: no threshold, or one that is not positive or beyond `reach`.
        """
        if not thresholds or not all(0 < threshold <= self.settings["reach"] for threshold in thresholds):
            raise ValueError(
                f"thresholds are {thresholds}, need distances above 0 and up to {self.settings['reach']} m"
            )
        figures, means = {}, []
        for label, name in enumerate(self.settings["classes"]):
            results = [sample[label] for sample in self.in_order()]
            total = sum(true for *_, true in results)
            values = [average_precision(results, threshold, total) for threshold in thresholds]
            figures[f"AP/{name}"] = float(np.mean(values)) if total else None
            figures |= {f"AP/{name}@{threshold:g}": value for threshold, value in zip(thresholds, values)}
            means += [figures[f"AP/{name}"]] if total else []
        return {"mAP": float(np.mean(means)) if means else None} | figures


def resample(line, number: int = POINTS) -> np.ndarray:
    """Returns (number, 2) points of a polyline (N, 2), N ≥ 1, equally far apart along it, both ends included."""
    line = np.asarray(line, dtype=np.float64)
    along = np.concatenate([[0.0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
    places = np.linspace(0, along[-1], number)
    return np.stack([np.interp(places, along, line[:, axis]) for axis in range(2)], axis=1)


def chamfer_distances(lines: np.ndarray, others: np.ndarray, reach: float = np.inf) -> np.ndarray:
    """Returns (P, G) distances: half the sum of the mean distances from a line's points to the nearest points of the
    other, both ways.

    Args:
        lines: (P, K, 2) points.
        others: (G, L, 2) points.
        reach: what is certainly farther is given as infinite: no two lines are nearer than their bounding boxes.
    """
    result = np.full((len(lines), len(others)), np.inf)
    if not result.size:
        return result
    low, high, other_low, other_high = lines.min(1), lines.max(1), others.min(1), others.max(1)
    apart = np.maximum(low[:, None] - other_high, other_low - high[:, None]).clip(min=0)  # (P, G, 2)
    close = np.hypot(*np.moveaxis(apart, 2, 0)) <= reach + 1e-9
    for column, other in enumerate(others):
        rows = np.flatnonzero(close[:, column])
        squares = cdist(lines[rows].reshape(-1, 2), other, "sqeuclidean").reshape(len(rows), lines.shape[1], len(other))
        if len(rows):
            result[rows, column] = (np.sqrt(squares.min(2)).mean(1) + np.sqrt(squares.min(1)).mean(1)) / 2
    return result


def _checked(lines, labels, classes, name, label_name):
    """(P, POINTS, 2) points and (P,) labels."""
    labels = np.asarray(labels, dtype=np.int64).reshape(-1)
    lines = [np.asarray(line, dtype=np.float64) for line in lines]
    if len(lines) != len(labels):
        raise ValueError(f"MapMetric.add: {len(lines)} {name} with {len(labels)} {label_name}; need one for each")
    for line in lines:
        if line.ndim != 2 or line.shape[1] != 2 or not len(line):
            raise ValueError(f"MapMetric.add: one of {name} has shape {line.shape}, needs (points ≥ 1, 2)")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"MapMetric.add: {label_name} reach from {labels.min()} to {labels.max()}; {classes} classes")
    points = np.full((len(lines), POINTS, 2), np.nan)
    for row, line in zip(points, lines):
        if np.isfinite(line).all():
            row[:] = resample(line)
    return points, labels


def _nearest(distances):
    """For each row its nearest column and how far that is, infinite where there is none."""
    if not distances.size:
        return np.zeros(len(distances), np.int64), np.full(len(distances), np.inf)
    nearest = distances.argmin(axis=1)
    return nearest, distances[np.arange(len(distances)), nearest]


def average_precision(results, threshold, total):
    if not total:
        return None
    scores = np.concatenate([scores for scores, *_ in results])
    right = np.concatenate([_right(*result[:3], threshold) for result in results])
    return ranked_precision(scores, right, total)


def ranked_precision(scores, right, total: int) -> float:
    """Average precision of results by their scores (P,) and whether each is right (P,) bool, where `total` ≥ 1 are to
    be found: the area under the envelope of precision over recall."""
    right = right[np.argsort(-scores, kind="stable")]
    recall = np.concatenate([[0.0], right.cumsum() / total])
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * envelope).sum())


def _right(scores, nearest, distance, threshold):
    """(P,) bool: which predictions of a sample are the first, by score, to claim their line."""
    right = np.zeros(len(scores), dtype=bool)
    order = np.argsort(-scores, kind="stable")
    claims = order[distance[order] <= threshold]
    right[claims[np.unique(nearest[claims], return_index=True)[1]]] = True
    return right
