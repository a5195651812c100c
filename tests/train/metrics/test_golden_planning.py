"""L2 and collisions against SparseDrive's own evaluation of made-up paths."""

import json

import numpy as np
import pytest

from rigfuse.train.metrics.planning import EGO_SHIFT, PlanningMetric, collisions
from support.golden import golden_sets

SETS = golden_sets("planning_metric")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of the planning metric beside the checkout")


def turned(rows):
    """From the LiDAR frame of nuScenes (y ahead) to x ahead."""
    rows = np.array(rows, dtype=np.float64)
    rows[:, 0], rows[:, 1] = rows[:, 1].copy(), -rows[:, 0]
    if rows.shape[1] > 2:
        rows[:, 6] -= np.pi / 2
    return rows


def samples(golden):
    data = golden.load("data")
    for i in range(sum(key.endswith("/prediction") for key in data)):
        boxes = [data.get(f"{i}/future_boxes/{step}", np.zeros((0, 7))) for step in range(6)]
        path, true = turned(data[f"{i}/prediction"]), turned(data[f"{i}/gt_step"].cumsum(axis=0))
        yield f"{i:04}", path, true, data[f"{i}/gt_mask"] > 0, [turned(x) for x in boxes]


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_figures(golden):
    scores = json.loads((golden.folder / "scores.json").read_text())
    metric = PlanningMetric(seconds=(0.5, 1, 1.5, 2, 2.5, 3))
    usual = PlanningMetric()
    for sample in samples(golden):
        before = [np.copy(x) for x in (*sample[1:4], *sample[4])]
        metric.add(*sample)
        usual.add(*sample)
        for x, y in zip((*sample[1:4], *sample[4]), before, strict=True):
            np.testing.assert_array_equal(x, y)  # upstream mirrors what it is given
    figures = metric.compute() | usual.compute()
    assert figures["samples"] == scores["per_step"]["total"]
    names = dict(L2="L2", obj_box_col="collision", obj_col="true_collision")
    for theirs, ours in names.items():
        assert figures[f"{ours}/mean"] == pytest.approx(scores["result"][theirs], abs=1e-6)
        for step, value in enumerate(scores["per_step"][theirs], 1):
            assert figures[f"{ours}/endpoint@{step / 2:g}s"] == pytest.approx(value, abs=1e-6)
            mean = np.mean(scores["per_step"][theirs][:step])
            assert figures[f"{ours}/mean@{step / 2:g}s"] == pytest.approx(mean, abs=1e-6)
        ends = [scores["per_step"][theirs][step] for step in (1, 3, 5)]
        assert figures[f"{ours}/endpoint"] == pytest.approx(np.mean(ends), abs=1e-6)


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_every_step(golden):
    data, used = golden.load("data"), [sample for sample in samples(golden) if sample[3].all()]
    assert [int(sample[0]) for sample in used] == data["used"].tolist()
    for row, (_, path, true, _, boxes) in enumerate(used):
        true_hits = collisions(true, boxes, EGO_SHIFT["lidar"])
        np.testing.assert_array_equal(true_hits, data["gt_collision"][row])
        hits = collisions(path, boxes, EGO_SHIFT["lidar"]) & ~true_hits
        np.testing.assert_array_equal(hits, data["prediction_collision_not_gt"][row])
