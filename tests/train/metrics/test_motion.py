"""Motion figures: known errors, classes and ranges, what there is no figure for, and shares."""

from dataclasses import replace

import numpy as np
import pytest

from rigfuse.train.metrics.motion import FoundAgents, MotionMetric, TrueAgents


def scene(rng, number=30):
    """Agents far from one another that drive straight, and predictions that are equal to the truth in one mode."""
    centres = np.stack(np.meshgrid(np.arange(-3, 3), np.arange(-2, 3)), -1).reshape(-1, 2)[:number] * 5.0
    paths = centres[:, None] + np.arange(1, 13)[:, None] * rng.normal(0, 1, (number, 1, 2))
    names = ["pedestrian" if i % 3 == 0 else "truck" for i in range(number)]
    modes = np.stack([paths + 10, paths, paths - 7], axis=1)
    found = FoundAgents(names, centres, rng.uniform(0.1, 0.9, number), modes)
    return found, TrueAgents(names, centres, paths, np.ones((number, 12), dtype=bool))


@pytest.fixture
def agents():
    return scene(np.random.default_rng(0))


def figures(*samples, **settings):
    metric = MotionMetric(**settings)
    for index, sample in enumerate(samples):
        metric.add(f"{index}", *sample)
    return metric.compute()


def test_a_mode_that_is_the_truth_is_perfect(agents):
    result = figures(agents)
    assert (result["truths/car"], result["truths/pedestrian"]) == (20, 10) and result["matches/car"] == 20
    for label in ("car", "pedestrian"):
        assert [result[f"{name}/{label}"] for name in ("minADE", "minFDE", "miss_rate", "EPA")] == [0, 0, 0, 1]


def test_errors_of_known_size(agents):
    found, truth = agents
    drift = np.zeros((12, 2))
    drift[:, 1] = np.arange(1, 13) / 4  # 3 m at the end
    result = figures((replace(found, paths=found.paths + drift), truth))
    assert result["minADE/car"] == pytest.approx(drift[:, 1].mean())
    assert result["minFDE/car"] == pytest.approx(3) and result["miss_rate/car"] == 1 and result["EPA/car"] == 0
    short = replace(truth, mask=np.arange(12) < np.full((30, 1), 4))  # up to 1 m
    result = figures((replace(found, paths=found.paths + drift), short))
    assert result["minFDE/car"] == pytest.approx(1) and result["miss_rate/car"] == 0 and result["EPA/car"] == 1
    gap = replace(truth, mask=(np.arange(12) < 4) | (np.arange(12) > 6) & np.ones((30, 1), dtype=bool))
    assert figures((replace(found, paths=found.paths + drift), gap)) == result


def test_a_false_prediction_costs_half_a_truth(agents):
    found, truth = agents
    for centre, name in (((0.0, 30.0), "car"), ((40.5, 0.0), "pedestrian"), ((0.0, 30.0), "traffic_cone")):
        more = FoundAgents(
            [*found.names, name],
            np.append(found.centres, [centre], axis=0),
            np.append(found.scores, 0.99),
            np.append(found.paths, found.paths[:1], axis=0),
        )
        result = figures((more, truth))
        assert result["EPA/car"] == (1 - 0.5 / 20 if name == "car" else 1)
        assert result["EPA/pedestrian"] == 1  # 40.5 m is out of range
    assert figures((more, truth), ranges=None, classes={"traffic_cone": "cone"})["matches/cone"] == 0


def test_a_class_without_truth_or_match_has_no_figure(agents):
    found, truth = agents
    result = figures((found, replace(truth, names=["car"] * 30)))
    assert [result[f"{name}/pedestrian"] for name in ("minADE", "minFDE", "miss_rate", "EPA")] == [None] * 4
    result = figures((replace(found, centres=found.centres + 2.5), truth), ranges=None)
    assert result["minADE/car"] is None and result["matches/car"] == 0
    assert result["EPA/car"] == -0.5 * 20 / 20
    none = FoundAgents([], [], [], []), TrueAgents([], [], [], [])
    assert figures(none)["EPA/car"] is None and figures()["minADE/car"] is None
    assert figures((none[0], truth))["EPA/car"] == 0 and figures((found, none[1]))["truths/car"] == 0
    blind = replace(truth, mask=np.zeros((30, 12), dtype=bool))
    assert figures((found, blind))["minADE/car"] is None
    assert figures((found, blind), empty_futures="perfect")["minADE/car"] == 0


def test_shares_give_the_figures_of_the_whole():
    rng = np.random.default_rng(4)
    samples = []
    for _ in range(6):
        found, truth = scene(rng)
        samples.append((replace(found, paths=found.paths + rng.normal(0, 1, found.paths.shape)), truth))
    whole, parts = MotionMetric(), [MotionMetric() for _ in range(2)]
    for index, sample in enumerate(samples):
        whole.add(f"{index}", *sample)
        parts[index % 2].add(f"{index}", *sample)
    parts[1].merge(parts[0])
    assert parts[1].compute() == whole.compute() and 0 < whole.compute()["minADE/car"] < 3


def test_refusals(agents):
    found, truth = agents
    with pytest.raises(ValueError, match="a score is not finite"):
        MotionMetric().add("a", replace(found, scores=np.full(30, np.nan)), truth)
    with pytest.raises(ValueError, match="a predicted path is not finite"):
        MotionMetric().add("a", replace(found, paths=found.paths * np.nan), truth)
    with pytest.raises(ValueError, match="need one"):
        MotionMetric().add("a", replace(found, names=["car"]), truth)
    with pytest.raises(ValueError, match="need a mode and 12 steps"):
        MotionMetric().add("a", replace(found, paths=found.paths[:, :, :6]), truth)
    with pytest.raises(ValueError, match="empty_futures is 'zero'"):
        MotionMetric(empty_futures="zero")
