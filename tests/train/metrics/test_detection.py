"""The official figures: of the ground truth, of errors of a known size, of nothing, and of rubbish."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from rigfuse.modules.detection.boxes import DETECTION_CLASSES, Detections
from rigfuse.train.data import open_drives
from rigfuse.train.data.nuscenes import open_nuscenes
from rigfuse.train.metrics.detection import evaluate_detection, write_results
from rigfuse.train.systems.cmt_aqr.data import DetectionConfig, DetectionSamples
from support import detection_on_ranks
from support.ranks import run_ranks

# Every object that the evaluation counts: with points, and in the largest of its ranges.
COUNTED = DetectionConfig(cbgs=False, point_range=(-60.0, -60.0, -20.0, 60.0, 60.0, 20.0))
NAMES = dict(trans_err="mATE", scale_err="mASE", orient_err="mAOE", vel_err="mAVE", attr_err="mAAE")


def ground_truth(root, split):
    samples = DetectionSamples(open_drives(root, split=split), COUNTED, training=True)
    found = {}
    for place in range(len(samples)):
        moment = samples.moment(place)
        boxes, labels = samples.targets(moment)
        found[moment.token] = Detections(boxes, torch.linspace(1, 0.5, len(boxes)), labels)
    return found


@pytest.fixture(scope="module")
def truth(small_world):
    return ground_truth(small_world, "world_val")


def changed(found, change):
    result = {}
    for token, x in found.items():
        boxes = x.boxes.clone()
        change(boxes)
        result[token] = replace(x, boxes=boxes)
    return result


def by_hand(root, split, results, folder):
    """The devkit's figures of a results file under our names."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    nusc, config = open_nuscenes(root), config_factory("detection_cvpr_2019")
    metrics = DetectionEval(nusc, config, str(results), split, str(folder), verbose=False).evaluate()[0].serialize()
    figures = dict(mAP=metrics["mean_ap"], NDS=metrics["nd_score"])
    figures |= {NAMES[error]: value for error, value in metrics["tp_errors"].items()}
    return figures | {f"AP/{name}": value for name, value in metrics["mean_dist_aps"].items()}


def test_the_ground_truth_is_perfect_and_the_devkit_agrees(small_world, truth, tmp_path, capfd):
    figures = evaluate_detection(truth, small_world, None, "world_val", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert figures["mAP"] == pytest.approx(1)
    for name in ("mATE", "mASE", "mAOE", "mAVE"):
        assert figures[name] < 1e-3, name
    assert figures["mAAE"] < 0.2  # a car that stands may be parked or stopped
    assert [name for name in figures if name.startswith("AP/")] == [f"AP/{name}" for name in DETECTION_CLASSES]
    assert figures == by_hand(small_world, "world_val", tmp_path / "results.json", tmp_path / "devkit")
    assert json.loads((tmp_path / "metrics_summary.json").read_text())["nd_score"] == figures["NDS"]
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "name, value, change",
    [
        ("mATE", 0.3, lambda boxes: boxes[:, 0].add_(0.3)),
        ("mASE", 1 - 1 / 1.1**3, lambda boxes: boxes[:, 3:6].mul_(1.1)),
        ("mAOE", 0.2, lambda boxes: boxes[:, 6].add_(0.2)),
        ("mAVE", 0.5, lambda boxes: boxes[:, 8].add_(0.5)),
    ],
)
def test_an_error_of_known_size_is_what_comes_out(small_world, truth, name, value, change):
    figures = evaluate_detection(changed(truth, change), small_world, "v1.0-mini", "world_val")
    assert figures[name] == pytest.approx(value, abs=2e-3) and figures["mAP"] == pytest.approx(1)
    for other in {"mATE", "mASE", "mAOE", "mAVE"} - {name}:
        assert figures[other] < 1e-3, other


def test_attributes_follow_from_class_and_speed(small_world, truth, tmp_path):
    from nuscenes.eval.detection.utils import detection_name_to_rel_attributes

    boxes = next(iter(truth.values())).boxes[:1].repeat(20, 1)
    boxes[:10, 7:], boxes[10:, 7:] = torch.tensor([0.0, -0.21]), torch.tensor([0.1, -0.1])
    found = {next(iter(truth)): Detections(boxes, torch.linspace(1, 0.1, 20), torch.arange(20) % 10)}
    write_results(found, open_nuscenes(small_world), "world_val", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())["results"][next(iter(truth))]
    moves, stands = ([row["attribute_name"].split(".")[-1] for row in half] for half in (rows[:10], rows[10:]))
    assert moves == ["moving"] * 5 + ["", "with_rider", "with_rider", "moving", ""]
    assert stands == ["parked"] * 3 + ["stopped", "parked", "", "without_rider", "without_rider", "standing", ""]
    for row, name in zip(rows, DETECTION_CLASSES * 2, strict=True):
        assert row["attribute_name"] in (detection_name_to_rel_attributes(name) or [""])


@pytest.mark.parametrize("found", ["no sample", "no box", "no finite box"])
def test_nothing_found_gives_nothing(small_world, truth, found, tmp_path):
    detections = dict.fromkeys(truth, Detections(torch.empty(0, 9), torch.empty(0), torch.empty(0, dtype=torch.int64)))
    if found == "no finite box":
        detections = changed(truth, lambda boxes: boxes[:, 3].fill_(torch.nan))
    figures = evaluate_detection(detections if "box" in found else {}, small_world, None, "world_val", tmp_path)
    # The devkit needs a box to begin with: one far away, which it leaves out.
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"] == {token: [] for token in truth}
    far = {token: replace(x, boxes=x.boxes + 1e4) for token, x in list(truth.items())[:1]}
    write_results(far, open_nuscenes(small_world), "world_val", tmp_path / "far.json")
    assert figures == by_hand(small_world, "world_val", tmp_path / "far.json", tmp_path / "devkit")
    assert figures["mAP"] == figures["NDS"] == 0 and figures["mAVE"] == 1


def test_rubbish_leaves_a_valid_file(small_world, truth, tmp_path):
    first, second, third = sorted(truth)
    boxes = truth[first].boxes[:1].repeat(700, 1)
    scores = torch.rand(700)
    boxes[:, 0] = scores  # so that a box tells its score
    broken = truth[first].boxes[:1].repeat(6, 1)
    broken[0, 0], broken[1, 4], broken[2, 6] = torch.inf, 0.0, torch.nan
    broken[3, 7:] = torch.nan
    marks = torch.tensor([0.9, 0.8, 0.7, 0.6, torch.nan, 0.5])
    found = {
        first: Detections(boxes, scores, torch.zeros(700, dtype=torch.int64)),
        second: Detections(broken, marks, torch.full((6,), 8)),
    }
    assert write_results(found, open_nuscenes(small_world), "world_val", tmp_path / "results.json") == 502
    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["results"]
    assert rows.keys() == truth.keys() and rows[third] == []
    kept = [row["detection_score"] for row in rows[first]]
    torch.testing.assert_close(torch.tensor(kept), scores.sort(descending=True).values[:500])
    assert [row["detection_score"] for row in rows[second]] == pytest.approx([0.6, 0.5])
    assert rows[second][0]["velocity"] == [0, 0] and rows[second][0]["attribute_name"] == "pedestrian.standing"


def test_every_rank_has_the_figures_of_the_whole(small_world, truth, tmp_path):
    found = changed(truth, lambda boxes: boxes[:, 0].add_(torch.randn(len(boxes))))
    run_ranks(detection_on_ranks.evaluate_share, 2, found, str(small_world), "world_val", str(tmp_path))
    expected = evaluate_detection(found, small_world, None, "world_val")
    assert 0 < expected["mAP"] < 0.99
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2


def test_refusals(small_world, truth, monkeypatch):
    with pytest.raises(ValueError, match="3 samples with detections are not in the split 'world_train': "):
        evaluate_detection(truth, small_world, None, "world_train")
    with pytest.raises(ValueError, match="no sample of the split 'mini_val' is in "):
        evaluate_detection({}, small_world, None, "mini_val")
    with pytest.raises(ValueError, match="world_vall"):
        evaluate_detection({}, small_world, None, "world_vall")
    with pytest.raises(FileNotFoundError, match="has no version 'v1.0-test'"):
        evaluate_detection({}, small_world, "v1.0-test", "world_val")
    monkeypatch.setitem(sys.modules, "nuscenes", None)
    with pytest.raises(ImportError, match=r"needs nuscenes: pip install '.\[nuscenes\]'"):
        evaluate_detection({}, small_world, None, "world_val")


def test_real_annotations_are_found_perfect(nuscenes_root):
    """Seven of the ten classes are in mini_val."""
    figures = evaluate_detection(ground_truth(nuscenes_root, "mini_val"), nuscenes_root, None, "mini_val")
    assert figures["mAP"] == pytest.approx(0.7, abs=1e-6)
    assert {name for name, value in figures.items() if value == 0} == {
        "AP/construction_vehicle", "AP/trailer", "AP/barrier"
    }  # fmt: skip
