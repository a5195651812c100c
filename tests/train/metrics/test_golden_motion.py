"""The motion figures against SparseDrive's own evaluation, and where that is mended, against loops written out here."""

import json

import numpy as np
import pytest

from rigfuse.train.metrics.motion import FoundAgents, MotionMetric, TrueAgents
from support.golden import golden_sets

SETS = golden_sets("motion_metric")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of the motion metric beside the checkout")
MERGED = ("car", "pedestrian", "barrier")
NAMES = dict(min_ade_err="minADE", min_fde_err="minFDE", miss_rate_err="miss_rate", EPA="EPA")


def measured(data, **settings):
    metric = MotionMetric(ranges=None, **settings)
    for sample in np.union1d(data["gt"][:, 0], data["prediction"][:, 0]):
        true, own = data["gt"][:, 0] == sample, data["prediction"][:, 0] == sample
        gt, rows = data["gt"][true], data["prediction"][own]
        found = FoundAgents(
            data["names"][rows[:, 1].astype(int)], rows[:, 2:4], rows[:, -1], data["prediction_trajectory"][own]
        )
        known = np.arange(12) < gt[:, -1:]
        truth = TrueAgents([MERGED[int(x)] for x in gt[:, 1]], gt[:, 2:4], data["gt_trajectory"][true], known)
        metric.add(f"{sample:04.0f}", found, truth)
    return metric.compute()


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_upstreams_figures(golden):
    figures, scores = (
        measured(golden.load("data"), empty_futures="perfect"),
        json.loads((golden.folder / "scores.json").read_text()),
    )
    for label in ("car", "pedestrian"):
        for theirs, ours in NAMES.items():
            assert figures[f"{ours}/{label}"] == pytest.approx(scores[f"{label}_{theirs}"], abs=1e-12)


def mended(data, label):
    """minADE, minFDE and miss rate of a class, a match without a future left out; in loops."""
    merged = {"barrier": "barrier", "traffic_cone": "barrier", "pedestrian": "pedestrian"}
    own = [i for i, row in enumerate(data["prediction"]) if merged.get(data["names"][int(row[1])], "car") == label]
    true = [i for i, row in enumerate(data["gt"]) if MERGED[int(row[1])] == label]
    taken, recall, scores, nodes, sums, means = set(), [], [], [], np.zeros(3), []
    for i in sorted(own, key=lambda i: -data["prediction"][i, -1]):
        row, best, best_distance = data["prediction"][i], None, np.inf
        for j in true:
            distance = np.hypot(*(row[2:4] - data["gt"][j, 2:4]))
            if data["gt"][j, 0] == row[0] and j not in taken and distance < best_distance:
                best, best_distance = j, distance
        if best_distance < 2:
            taken.add(best)
            steps = int(data["gt"][best, -1])
            if steps:
                away = data["prediction_trajectory"][i, :, :steps] - data["gt_trajectory"][best, :steps]
                away = np.sqrt((away**2).sum(-1))
                sums = sums + [min(away.mean(1)), min(away[:, -1]), float(min(away.max(1)) > 2)]
                nodes.append(row[-1])
                means.append(sums / len(nodes))
        recall.append(len(taken) / len(true))
        scores.append(row[-1])
    confidence = np.interp(np.linspace(0, 1, 101), recall, scores, right=0)
    curves = [np.interp(confidence[::-1], nodes[::-1], curve[::-1])[::-1] for curve in np.array(means).T]
    return [curve[11 : np.flatnonzero(confidence)[-1] + 1].mean() for curve in curves]


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_a_match_without_a_future_is_left_out(golden):
    data = golden.load("data")
    figures, theirs = measured(data), measured(data, empty_futures="perfect")
    for label in ("car", "pedestrian"):
        ours = [figures[f"{name}/{label}"] for name in ("minADE", "minFDE", "miss_rate")]
        assert ours == pytest.approx(mended(data, label), abs=1e-12)
        assert ours[0] > theirs[f"minADE/{label}"] and figures[f"EPA/{label}"] == theirs[f"EPA/{label}"]
