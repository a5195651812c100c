"""Planning figures and the plans without a network, by cases whose answer is known."""

import numpy as np
import pytest

from rigfuse.train.metrics.planning import EGO_LENGTH, EGO_WIDTH, PlanningMetric, collisions, headings
from rigfuse.train.metrics.planning_baselines import baseline_paths, constant_velocity, follow_leader, standing_still

AHEAD = np.stack([np.arange(1, 7) * 5.0, np.zeros(6)], axis=1)  # 10 m/s
KNOWN = np.ones(6, dtype=bool)
EMPTY = [np.zeros((0, 7))] * 6


def box(x, y, length=4.0, width=2.0, yaw=0.0):
    return np.array([[x, y, 0.8, length, width, 1.6, yaw]])


def one(path, boxes=EMPTY, true=AHEAD, mask=KNOWN, **settings):
    metric = PlanningMetric(**settings)
    metric.add("a", path, true, mask, boxes)
    return metric.compute()


def test_the_two_protocols():
    off = AHEAD + np.stack([np.zeros(6), np.arange(1, 7) / 2], axis=1)  # 0.5, 1, … 3 m beside
    figures = one(off)
    assert [figures[f"L2/endpoint@{t}s"] for t in (1, 2, 3)] == pytest.approx([1, 2, 3])
    assert [figures[f"L2/mean@{t}s"] for t in (1, 2, 3)] == pytest.approx([0.75, 1.25, 1.75])
    assert figures["L2/endpoint"] == pytest.approx(2) and figures["L2/mean"] == pytest.approx(1.25)
    assert (figures["samples"], figures["skipped"], figures["collision/mean"]) == (1, 0, 0)


def test_collisions_of_the_plan_but_not_of_the_truth():
    # At step 4 (2 s) the planned car stands in a box that the true one passes.
    left = AHEAD + [0, 3.0]
    boxes = [*EMPTY[:3], box(20.5, 3.0), *EMPTY[4:]]
    figures = one(left, boxes)
    assert [figures[f"collision/endpoint@{t}s"] for t in (1, 2, 3)] == [0, 1, 0]
    assert [figures[f"collision/mean@{t}s"] for t in (1, 2, 3)] == pytest.approx([0, 1 / 4, 1 / 6])
    wide = [*EMPTY[:3], box(20.5, 3.0, width=9.0), *EMPTY[4:]]  # now the truth is hit as well
    figures = one(left, wide)
    assert figures["collision/mean"] == 0 and figures["true_collision/endpoint@2s"] == 1


@pytest.mark.parametrize("frame, shift", [("lidar", 0.5), ("ego", 1.44)])
def test_where_the_car_is(frame, shift):
    """A box that is just touched by the front, the back, and a side of a car that drives along any direction."""
    for turn in (0.0, 0.7, -2.0):
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        for along, across in ((EGO_LENGTH / 2 + 1, 0), (-EGO_LENGTH / 2 - 1, 0), (0, EGO_WIDTH / 2 + 1)):
            for gap, hit in ((-1e-6, True), (1e-6, False)):
                out = np.sign([along, across]) * gap
                centre = rotation @ ([5 + shift + along + out[0], across + out[1]])
                others = [box(*centre, 2.0, 2.0, turn), *EMPTY[1:]]
                figures = one(AHEAD @ rotation.T, others, true=AHEAD @ rotation.T + 50, frame=frame, seconds=(0.5,))
                assert figures["collision/endpoint"] == hit, (turn, along, across, gap)


def test_headings():
    circle = 20 * np.stack([np.sin(np.arange(1, 7) / 10), 1 - np.cos(np.arange(1, 7) / 10)], axis=1)
    np.testing.assert_allclose(headings(circle), [0.1, 0.2, 0.3, 0.4, 0.5, 0.55], atol=1e-9)
    still = np.random.default_rng(0).normal(0, 0.05, (6, 2))
    assert (headings(still) == 0).all()


def test_a_sample_without_a_whole_future_is_skipped():
    metric = PlanningMetric()
    metric.add("a", AHEAD, np.full((6, 2), np.nan), ~KNOWN, [])
    assert metric.compute()["L2/mean"] is None and metric.compute()["collision/endpoint@1s"] is None
    metric.add("b", AHEAD + 1, AHEAD, KNOWN, EMPTY)
    figures = metric.compute()
    assert (figures["samples"], figures["skipped"]) == (1, 1) and figures["L2/mean"] == pytest.approx(2**0.5)


def test_shares_give_the_figures_of_the_whole():
    rng = np.random.default_rng(0)
    whole, parts = PlanningMetric(), [PlanningMetric() for _ in range(3)]
    for index in range(10):
        boxes = [np.concatenate([box(*rng.uniform(-5, 35, 2)) for _ in range(4)]) for _ in range(6)]
        mask = KNOWN if index % 4 else KNOWN & (np.arange(6) < 3)
        sample = (f"{index}", AHEAD + rng.normal(0, 1, (6, 2)), AHEAD, mask, boxes)
        whole.add(*sample)
        parts[index % 3].add(*sample)
    parts[0].merge(parts[2], parts[1])
    assert parts[0].compute() == whole.compute() and whole.compute()["skipped"] == 3


def leader(gap, speed, y=0.0):
    """Boxes with one whose rear is `gap` metres before the ego car's front."""
    return [[0.5 + EGO_LENGTH / 2 + gap + 2, y, 0.8, 4, 2, 1.6, 0, speed, 0], [-9, 0, 0.8, 4, 2, 1.6, 0, 20, 0]]


def test_constant_velocity_and_standing_still():
    np.testing.assert_allclose(constant_velocity((10, 1)), np.arange(1, 7)[:, None] * [5, 0.5])
    assert (constant_velocity((np.nan, np.nan)) == standing_still()).all()


def test_following_the_leader():
    free = constant_velocity((10, 0))
    for boxes in ([], leader(1e4, 10), leader(20, 0, y=4.0), leader(-9, 0)):
        np.testing.assert_allclose(follow_leader((10, 0), boxes), free, atol=1e-3)
    stops = follow_leader((10, 0), leader(15, 0))  # the gap closes, the bumpers do not meet
    assert (np.diff(stops[:, 0], prepend=0) >= 0).all() and 8 < stops[-1, 0] < 15
    long = follow_leader((10, 0), leader(15, 0), steps=60)
    assert long[-1, 0] == pytest.approx(13, abs=0.3)  # 2 m behind it
    assert follow_leader((10, 0), leader(15, 5))[-1, 0] > stops[-1, 0]
    assert not collisions(stops, [np.array(leader(15, 0))[:, :7]] * 6, 0.5).any()
    turned = follow_leader((0, 10), [[0, 0.5 + EGO_LENGTH / 2 + 17, 0.8, 4, 2, 1.6, np.pi / 2, 0, np.nan]])
    np.testing.assert_allclose(turned, stops[:, ::-1], atol=1e-9)
    paths = baseline_paths((10, 0), leader(15, 0))
    assert {name: path.shape for name, path in paths.items()} == dict.fromkeys(paths, (6, 2)) and len(paths) == 3


def test_refusals():
    with pytest.raises(ValueError, match=r"path has shape \(5, 2\), needs \(6, 2\)"):
        one(AHEAD[:5])
    with pytest.raises(ValueError, match="a position is not finite"):
        one(AHEAD * np.nan)
    with pytest.raises(ValueError, match="boxes of 5 steps, needs 6"):
        one(AHEAD, EMPTY[:5])
    with pytest.raises(ValueError, match="frame is 'world', needs one of lidar, ego"):
        PlanningMetric(frame="world")
    with pytest.raises(ValueError, match="seconds are .*, need times from 0.5 to 3.0"):
        PlanningMetric(seconds=(1, 4))
