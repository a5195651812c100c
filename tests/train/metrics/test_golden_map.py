"""The map AP against SparseDrive's own evaluation of made-up lines."""

import json

import numpy as np
import pytest

from rigfuse.train.metrics.map import MapMetric, chamfer_distances, resample
from support.golden import golden_sets

SETS = golden_sets("map_metric")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of the map metric beside the checkout")
CLASSES = ("ped_crossing", "divider", "boundary")


def read(golden, file):
    return json.loads((golden.folder / f"{file}.json").read_text())


def lines_of(sample):
    return [line for label in sample for line in sample[label]], [int(label) for label in sample for _ in sample[label]]


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_average_precision(golden):
    truth, found, scores = read(golden, "ground_truth"), read(golden, "predictions")["results"], read(golden, "scores")
    metric, counts = MapMetric(CLASSES), np.zeros((2, 3), dtype=int)
    for token, sample in truth.items():
        own = found.get(token, dict(vectors=[], scores=[], labels=[]))
        lines, labels = lines_of(sample)
        metric.add(token, own["vectors"], own["labels"], own["scores"], lines, labels)
        counts += [np.bincount(np.array(x, dtype=int), minlength=3) for x in (labels, own["labels"])]
    figures = metric.compute()
    assert figures["mAP"] == pytest.approx(scores["result"]["mAP_normal"], abs=1e-12)
    for label, name in enumerate(CLASSES):
        assert figures[f"AP/{name}"] == pytest.approx(scores["result"][name], abs=1e-12)
        for threshold, value in scores["ap"][name].items():
            assert figures[f"AP/{name}@{float(threshold):g}"] == pytest.approx(value, abs=1e-12)
        assert counts[:, label].tolist() == [scores["num_gts"][name], scores["num_preds"][name]]


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_points_and_distances(golden):
    truth, found, fine = read(golden, "ground_truth"), read(golden, "predictions")["results"], golden.load("fine")
    for key in fine:
        kind, token, label = key.split("/")
        own = found[token]
        lines = [line for line, its in zip(own["vectors"], own["labels"]) if its == int(label)]
        points = np.stack([resample(line) for line in lines])
        if kind == "interpolated_prediction":
            np.testing.assert_allclose(points, fine[key], atol=1e-12)
        else:
            true = np.stack([resample(line) for line in truth[token][label]])
            np.testing.assert_allclose(chamfer_distances(points, true), fine[key], atol=1e-12)
