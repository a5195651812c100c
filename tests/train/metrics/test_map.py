"""Map AP: what is right, ties, what there is no figure for, and an independent computation."""

import numpy as np
import pytest

from rigfuse.train.metrics.map import HARD_THRESHOLDS, MapMetric, chamfer_distances, resample
from rigfuse.train.metrics.pooling import figure_text, known

ROAD = [(-20.0, 3.0), (0.0, 4.0), (20.0, 3.0)]


def line(y, x=(-10.0, 10.0)):
    return np.array([[x[0], y], [x[1], y]])


def figures(*samples, thresholds=(0.5, 1.0, 1.5), classes=("divider", "ped_crossing", "boundary")):
    """Each sample: (lines, labels, scores, true lines, true labels)."""
    metric = MapMetric(classes)
    for index, sample in enumerate(samples):
        metric.add(f"{index:03}", *sample)
    return metric.compute(thresholds)


def random_sample(rng, classes=3):
    true = [rng.uniform(-15, 15, 2) + rng.normal(0, 4, (rng.integers(2, 9), 2)).cumsum(0) for _ in range(6)]
    labels = rng.integers(0, classes, 6)
    near = [x + rng.normal(0, 0.5, (1, 2)) for x in true for _ in range(3)]
    found, own = near + [rng.uniform(-15, 15, (4, 2)) for _ in range(4)], np.repeat(labels, 3)
    scores = rng.integers(1, 12, len(found)) / 12  # with ties
    return found, np.concatenate([own, rng.integers(0, classes, 4)]), scores, true, labels


def test_the_truth_is_perfect_in_either_direction_and_with_other_vertices():
    finer = resample(ROAD, 4001)[::-1]
    result = figures(([finer, line(1)], [2, 0], [0.3, 0.9], [ROAD, line(1)], [2, 0]), thresholds=HARD_THRESHOLDS)
    assert result["mAP"] == result["AP/boundary"] == result["AP/divider@0.2"] == 1


def test_a_class_without_truth_has_no_figure_and_is_left_out_of_the_mean():
    result = figures(([line(0), line(5)], [0, 1], [0.5, 0.9], [line(0)], [0]))
    assert result["mAP"] == result["AP/divider"] == 1
    assert result["AP/ped_crossing"] is None and result["AP/boundary@0.5"] is None
    assert known(result).keys() == {"mAP", "AP/divider", "AP/divider@0.5", "AP/divider@1", "AP/divider@1.5"}
    assert figure_text(result["AP/boundary"]) == "n/a" and figure_text(result["mAP"]) == "1.0000"
    assert figures(([line(0)], [0], [1.0], [], []))["mAP"] is None
    assert figures(([], [], [], [line(0)], [0]))["mAP"] == 0


def test_a_second_claim_is_wrong_even_if_another_line_is_near():
    true = [line(0), line(1)]
    # Both are nearest to the first line; the second of them is 0.7 m from the other, which nobody claims.
    result = figures(([line(0.1), line(0.3)], [0, 0], [0.9, 0.8], true, [0, 0]), thresholds=(1.0,))
    assert result["AP/divider"] == pytest.approx(0.5)


def test_a_distance_equal_to_the_threshold_is_right():
    shifted = figures(([line(0.5)], [0], [1.0], [line(0)], [0]))
    assert shifted["AP/divider@0.5"] == 1
    assert figures(([line(0.501)], [0], [1.0], [line(0)], [0]))["AP/divider@0.5"] == 0


def test_lines_that_are_not_finite_are_wrong_and_change_nothing_else():
    broken = np.full((2, 2), np.nan)
    result = figures(([broken, line(0), line(0)[:1]], [0, 0, 0], [0.9, 0.8, 0.1], [line(0)], [0]))
    assert result["AP/divider"] == pytest.approx(0.5)


def slow_average_precision(samples, label, threshold):
    """Written out in loops, without arrays."""
    rows, total = [], 0
    for number, (lines, labels, scores, true, true_labels) in enumerate(samples):
        true, taken = [resample(x) for x, own in zip(true, true_labels) if own == label], set()
        total += len(true)
        own = [place for place in range(len(lines)) if labels[place] == label]
        for place in sorted(own, key=lambda place: (-scores[place], place)):
            points, right = resample(lines[place]), False
            if true:
                apart = [np.hypot(*np.moveaxis(points[:, None] - other, 2, 0)) for other in true]
                distance = [(x.min(0).mean() + x.min(1).mean()) / 2 for x in apart]
                nearest = int(np.argmin(distance))
                right = distance[nearest] <= threshold and nearest not in taken
                taken |= {nearest} if right else set()
            rows.append((-scores[place], number, place, right))
    hits, precision = 0, []
    for count, (*_, right) in enumerate(sorted(rows), 1):
        hits += right
        precision.append((hits / count, right))
    return sum(max(p for p, _ in precision[i:]) for i, (_, right) in enumerate(precision) if right) / total


def test_against_loops():
    rng = np.random.default_rng(1)
    samples = [random_sample(rng) for _ in range(4)]
    result = figures(*samples)
    for label, name in enumerate(("divider", "ped_crossing", "boundary")):
        for threshold in (0.5, 1.0, 1.5):
            expected = slow_average_precision(samples, label, threshold)
            assert result[f"AP/{name}@{threshold:g}"] == pytest.approx(expected, abs=1e-12)
    assert 0.1 < result["mAP"] < 0.9


def test_far_lines_are_left_out_exactly():
    rng = np.random.default_rng(2)
    lines, others = (np.stack([resample(rng.uniform(-20, 20, (3, 2)), 50) for _ in range(12)]) for _ in range(2))
    lines[:6] = others[:6] + rng.normal(0, 1, (6, 1, 2))
    lines[6], others[6] = resample(line(0), 50), resample(line(1.9), 50)
    whole, near = chamfer_distances(lines, others), chamfer_distances(lines, others, 2.0)
    assert (near[whole <= 2] == whole[whole <= 2]).all() and (whole <= 2).sum() > 3
    assert np.isin(near, [*whole.ravel(), np.inf]).all() and np.isinf(near).any()


def test_resampling_is_even_by_length():
    points = resample([(0, 0), (3, 0), (3, 0), (3, 1)], 9)
    np.testing.assert_allclose(points, [(x / 2, 0) for x in range(7)] + [(3, 0.5), (3, 1)], atol=1e-12)
    assert (resample([(2, 1)]) == (2, 1)).all()


def test_shares_give_the_figures_of_the_whole():
    rng = np.random.default_rng(3)
    samples = {f"s{i}": random_sample(rng) for i in range(9)}
    whole, parts = MapMetric(), [MapMetric() for _ in range(3)]
    for index, (token, sample) in enumerate(samples.items()):
        whole.add(token, *sample)
        parts[index % 3].add(token, *sample)
        parts[2].add(token, *sample) if index == 0 else None  # a share that was filled up
    parts[2].merge(*parts[:2])
    assert parts[2].compute() == whole.compute()
    with pytest.raises(ValueError, match="merge: .* cannot join"):
        whole.merge(MapMetric(reach=1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores=[0.5]), r"scores have shape \(1,\), need \(2,\) finite"),
        (dict(scores=[0.5, np.nan]), "need .* finite numbers"),
        (dict(labels=[0, 3]), "labels reach from 0 to 3; 3 classes"),
        (dict(labels=[0]), "2 lines with 1 labels"),
        (dict(lines=[line(0), np.zeros((2, 3))]), r"one of lines has shape \(2, 3\)"),
        (dict(true_lines=[[(0, np.inf), (1, 1)]]), "true line of sample a is not finite"),
    ],
)
def test_refusals(change, message):
    good = dict(lines=[line(0), line(1)], labels=[0, 1], scores=[0.5, 0.6], true_lines=[line(0)], true_labels=[0])
    with pytest.raises(ValueError, match=message):
        MapMetric().add("a", **(good | change))
    with pytest.raises(ValueError, match="thresholds are .* up to 2"):
        MapMetric().compute((3.0,))
