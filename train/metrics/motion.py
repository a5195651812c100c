"""Figures of predicted futures of detected agents: minADE, minFDE, miss rate and EPA by class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .pooling import SampleResults

VEHICLES = ("car", "truck", "construction_vehicle", "bus", "trailer", "motorcycle", "bicycle")
# Detection class → the class it is judged in, and class → metres from the ego up to which it counts (UniAD's protocol).
MOTION_CLASSES = dict.fromkeys(VEHICLES, "car") | {"pedestrian": "pedestrian"}
MOTION_RANGES = {"car": 50.0, "pedestrian": 40.0}
NEAR = 2.0  # metres: of a match, of an end point that hits, of a mode that does not miss
_RECALLS = np.linspace(0, 1, 101)
_FIRST = 11  # the first recall above 0.1, where errors begin to count


@dataclass(frozen=True, eq=False)
class FoundAgents:
    """Predictions of one sample; arrays or CPU tensors, all in one frame whose origin is the ego car, metres.

    Args:
        names: (P,) detection classes.
        centres: (P, 2 or more), x and y first.
        scores: (P,).
        paths: (P, modes, steps, 2) positions.
    """

    names: Sequence[str]
    centres: np.ndarray
    scores: np.ndarray
    paths: np.ndarray


@dataclass(frozen=True, eq=False)
class TrueAgents:
    """Truths of one sample. Upstream leaves out objects in which no LiDAR or radar point lies.

    Args:
        names: (G,) detection classes.
        centres: (G, 2 or more).
        paths: (G, steps, 2) positions.
        mask: (G, steps) bool, which of them are known; what follows the first unknown one is not used.
    """

    names: Sequence[str]
    centres: np.ndarray
    paths: np.ndarray
    mask: np.ndarray


class MotionMetric(SampleResults):
    """UniAD's motion figures as SparseDrive computes them, pooled over samples.

    By descending score, each prediction takes the nearest free truth of its class and sample if their centres are less
    than 2 m apart, else it is false. A match's errors are those of its best mode over the known steps; a class's error
    is the devkit's: running means over descending score, read at recalls from 0.11 to the highest reached, averaged.

    Args:
        classes: detection class → the class it is judged in; other detection classes are left out.
        ranges: class → metres from the origin up to which truths and predictions count; None = everywhere.
        empty_futures: "left out": a match whose truth has no known future has no errors. "perfect": it counts as
            errors of 0 and no miss, as in SparseDrive's own evaluation.
    """

    def __init__(
        self,
        classes: Mapping[str, str] = MOTION_CLASSES,
        ranges: Mapping[str, float] | None = MOTION_RANGES,
        empty_futures: str = "left out",
    ):
        if empty_futures not in ("left out", "perfect"):
            raise ValueError(f"empty_futures is {empty_futures!r}, needs 'left out' or 'perfect'")
        ranges = None if ranges is None else dict(ranges)
        super().__init__(classes=dict(classes), ranges=ranges, empty_futures=empty_futures)

    def add(self, token: str, found: FoundAgents, truth: TrueAgents) -> None:
        """Adds one sample.

        Raises:
            ValueError: shapes that do not fit; a score, a predicted path or a known true step that is not finite.
        """
        centres, paths = _array(found.centres, (0, 2)), _array(found.paths, (0, 1, 1, 2))
        true_centres, true_paths = _array(truth.centres, (0, 2)), _array(truth.paths, (0, 1, 2))
        scores, mask = _array(found.scores, (0,)), _array(truth.mask, (0, 1)).astype(bool)
        _check(found, centres, scores, paths, truth, true_centres, true_paths, mask)
        steps = mask.cumprod(axis=1).sum(axis=1)
        result = {}
        for name in dict.fromkeys(self.settings["classes"].values()):
            own, true = self._of_class(name, found.names, centres), self._of_class(name, truth.names, true_centres)
            own = own[np.argsort(-scores[own], kind="stable")]
            apart = np.linalg.norm(centres[own, None, :2] - true_centres[None, true, :2], axis=-1)
            errors, known = _errors(paths[own], true_paths[true], steps[true], apart < NEAR)
            match, hits = _matches(apart, known | True), _matches(apart, known & (errors[1] < NEAR))
            matched = match >= 0
            rows = np.flatnonzero(matched)
            taken, future = np.zeros((3, len(own))), np.zeros(len(own), dtype=bool)
            taken[:, rows], future[rows] = errors[:, rows, match[rows]], known[rows, match[rows]]
            result[name] = _Judged(scores[own], matched, future, taken, int((hits >= 0).sum()), len(true))
        self.samples.setdefault(token, result)

    def compute(self) -> dict[str, float | None]:
        """minADE/CLASS and minFDE/CLASS (metres), miss_rate/CLASS, EPA/CLASS, truths/CLASS and matches/CLASS.

        EPA = (matches whose end point is within 2 m − 0.5 · false predictions) / truths, where matching starts afresh
        and a prediction that misses the end point of its nearest truth does not take it. A class without truth has no
        figure (None), and one whose recall, or whose matches with a future, do not suffice for an error has no error.
        """
        figures = {}
        for name in dict.fromkeys(self.settings["classes"].values()):
            results = [sample[name] for sample in self.in_order()]
            truths, hits = sum(result.truths for result in results), sum(result.hits for result in results)
            matched = np.concatenate([np.zeros(0, bool), *(result.matched for result in results)])
            errors = self._mean_errors(results, matched, truths) if matched.any() else [None] * 3
            figures |= {f"{error}/{name}": value for error, value in zip(("minADE", "minFDE", "miss_rate"), errors)}
            figures[f"EPA/{name}"] = (hits - 0.5 * int((~matched).sum())) / truths if truths else None
            figures |= {f"truths/{name}": truths, f"matches/{name}": int(matched.sum())}
        return figures

    def _of_class(self, name, names, centres):
        """Places of the agents that are judged in a class."""
        chosen = np.array([self.settings["classes"].get(own) == name for own in names], dtype=bool)
        if self.settings["ranges"] is not None:
            chosen &= np.linalg.norm(centres[:, :2], axis=1) < self.settings["ranges"][name]
        return np.flatnonzero(chosen)

    def _mean_errors(self, results, matched, truths):
        scores = np.concatenate([result.scores for result in results])
        future = np.concatenate([result.future for result in results])
        errors = np.concatenate([result.errors for result in results], axis=1)
        order = np.argsort(-scores, kind="stable")
        scores, matched, future, errors = scores[order], matched[order], future[order], errors[:, order]
        confidence = np.interp(_RECALLS, matched.cumsum() / truths, scores, right=0)
        last = np.flatnonzero(confidence)[-1] if confidence.any() else 0
        kept = matched if self.settings["empty_futures"] == "perfect" else future
        if last < _FIRST or not kept.any():
            return [None] * 3
        means = errors[:, kept].cumsum(axis=1) / np.arange(1, kept.sum() + 1)
        curves = [np.interp(confidence[::-1], scores[kept][::-1], mean[::-1])[::-1] for mean in means]
        return [float(curve[_FIRST : last + 1].mean()) for curve in curves]


class _Judged(NamedTuple):
    """The predictions of one class in one sample, by descending score."""

    scores: np.ndarray  # (P,)
    matched: np.ndarray  # (P,) bool
    future: np.ndarray  # (P,) bool: matched, and the truth has a future
    errors: np.ndarray  # (3, P) minADE, minFDE, miss; 0 without future
    hits: int  # of the matching for EPA
    truths: int


def _array(values, empty):
    """float64; `empty` is the shape where there is nothing."""
    values = np.asarray(values, dtype=np.float64)
    return values if values.size else np.zeros(empty)


def _check(found, centres, scores, paths, truth, true_centres, true_paths, mask):
    lengths = {len(found.names), len(centres), len(scores), len(paths)}
    true_lengths = {len(truth.names), len(true_centres), len(true_paths), len(mask)}
    if len(lengths) > 1 or len(true_lengths) > 1:
        raise ValueError(f"MotionMetric.add: of the predictions {lengths}, of the truths {true_lengths} rows; need one")
    if mask.shape != true_paths.shape[:2]:
        raise ValueError(f"MotionMetric.add: mask has shape {mask.shape}, paths of the truth have {true_paths.shape}")
    if len(paths) and len(mask) and (paths.shape[1] < 1 or paths.shape[2] < mask.shape[1]):
        raise ValueError(f"MotionMetric.add: paths have shape {paths.shape}, need a mode and {mask.shape[1]} steps")
    for name, values in (("score", scores), ("predicted path", paths), ("known true step", true_paths[mask])):
        if not np.isfinite(values).all():
            raise ValueError(f"MotionMetric.add: a {name} is not finite")


def _errors(paths, true_paths, steps, near):
    """minADE, minFDE and miss, (3, P, G), where `near`; and whether there is a future to compare with, (P, G)."""
    errors, known = np.zeros((3, *near.shape)), np.zeros(near.shape, dtype=bool)
    for row, column in zip(*near.nonzero()):
        number = steps[column]
        if number:
            apart = np.linalg.norm(paths[row, :, :number] - true_paths[column, :number], axis=-1)  # (modes, steps)
            errors[:, row, column] = apart.mean(1).min(), apart[:, -1].min(), apart.max(1).min() > NEAR
            known[row, column] = True
    return errors, known


def _matches(apart, allowed):
    """(P,): for each row in turn its nearest free column, −1 where that is 2 m away or more, or not allowed."""
    match, apart = np.full(len(apart), -1), apart.copy()
    for row in range(len(apart) if apart.size else 0):
        nearest = apart[row].argmin()
        if apart[row, nearest] < NEAR and allowed[row, nearest]:
            match[row] = nearest
            apart[:, nearest] = np.inf
    return match
