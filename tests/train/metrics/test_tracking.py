"""The official tracking figures: of the ground truth, of errors of a known kind, of nothing, and over ranks."""

import json
import sys

import numpy as np
import pytest

from rigfuse.train.data import open_drives
from rigfuse.train.data.nuscenes import open_nuscenes
from rigfuse.train.metrics.map import MapMetric
from rigfuse.train.metrics.tracking import TRACKING_CLASSES, TrackingMetric
from support import metrics_on_ranks
from support.ranks import run_ranks


def true_tracks(root, split):
    """Sample token → boxes, names, scores and ids of what the evaluation counts."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    tracks = {}
    for drive in open_drives(root, split=split):
        for moment in drive:
            boxes = [box for box in moment.ego_boxes if box.num_points and category_to_detection_name(box.category)]
            poses = [box.frame_T_box.numpy() for box in boxes]
            yaws = [np.arctan2(pose[1, 0], pose[0, 0]) for pose in poses]
            rows = [[*pose[:3, 3], *box.size, yaw, *box.velocity[:2]] for box, pose, yaw in zip(boxes, poses, yaws)]
            names = [category_to_detection_name(box.category) for box in boxes]
            ids = [box.instance for box in boxes]
            tracks[moment.token] = np.array(rows).reshape(-1, 9), names, np.full(len(rows), 0.9), ids
    return tracks


@pytest.fixture(scope="module")
def tracks(small_world):
    return true_tracks(small_world, "world_val")


def metric_of(tracks, root, split="world_val", **settings):
    metric = TrackingMetric(root, None, split, **settings)
    for token, sample in tracks.items():
        metric.add(token, *sample)
    return metric


def test_the_truth_is_perfect(small_world, tracks, tmp_path, capfd):
    figures = metric_of(tracks, small_world, out=tmp_path).compute()
    assert capfd.readouterr() == ("", "")
    assert figures["AMOTA"] == figures["RECALL"] == figures["MOTA"] == 1 and figures["AMOTP"] < 1e-3
    assert figures["IDS"] == figures["FP"] == figures["FN"] == 0 < figures["TP"]
    present = {name for _, names, _, _ in tracks.values() for name in names} & set(TRACKING_CLASSES)
    counted = {name for name in TRACKING_CLASSES if figures[f"AMOTA/{name}"] is not None}
    assert counted <= present and all(figures[f"AMOTA/{name}"] == 1 for name in counted)
    for file in ("results.json", "metrics_summary.json"):
        json.loads((tmp_path / file).read_text(), parse_constant=pytest.fail)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {row["tracking_id"].split("/")[0] for own in rows.values() for row in own} == {"world-0001"}


def test_ids_that_change_and_boxes_that_are_off(small_world, tracks):
    renamed = {
        token: (*sample[:3], [f"{place}-{name}" for name in sample[3]])
        for place, (token, sample) in enumerate(tracks.items())
    }
    figures = metric_of(renamed, small_world).compute()
    # The devkit fills the gaps of a track, which a box with a name of its own does not have.
    assert figures["IDS"] > 0 and figures["AMOTA"] < 1 and 0.95 < figures["RECALL"] <= 1
    moved = {token: (boxes + [0.5, *[0] * 8], *rest) for token, (boxes, *rest) in tracks.items()}
    figures = metric_of(moved, small_world).compute()
    assert figures["AMOTP"] == pytest.approx(0.5, abs=1e-3) and figures["IDS"] == 0


def test_nothing_found_gives_nothing(small_world, tracks, tmp_path):
    figures = metric_of({}, small_world, out=tmp_path).compute()
    assert figures["AMOTA"] == figures["RECALL"] == figures["TP"] == 0 and figures["AMOTP"] == 2 and figures["FN"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["results"] == {token: [] for token in tracks}


def test_every_rank_has_the_figures_of_the_whole(small_world, tracks, tmp_path):
    shares = [metric_of(dict(part), small_world) for part in (list(tracks.items())[:2], list(tracks.items())[1:])]
    foreign = [metric_of({"nowhere": next(iter(tracks.values()))}, small_world) for _ in range(2)]
    lines, maps = np.array([[[0.0, 0], [9, 0]], [[0, 5], [9, 5]]]), [MapMetric(), MapMetric()]
    for place, metric in enumerate(maps):
        metric.add(f"{place}", lines[:1] + place, [0], [0.5], lines, [0, 0])
    run_ranks(metrics_on_ranks.compute_share, 2, dict(tracking=shares, foreign=foreign, map=maps), str(tmp_path))
    maps[0].merge(maps[1])
    expected = dict(tracking=metric_of(tracks, small_world).compute(), map=maps[0].compute())
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "1 samples with tracks are not in the split" in result.pop("foreign")
        assert result == expected
    assert 0 < expected["map"]["mAP"] < 1


def test_refusals(small_world, tracks, monkeypatch):
    boxes, names, scores, ids = next(iter(tracks.values()))
    with pytest.raises(ValueError, match="sample a has .* need one for each box"):
        TrackingMetric(small_world, None, "world_val").add("a", boxes, names, scores, [ids[0]] * len(ids))
    with pytest.raises(ValueError, match="samples with tracks are not in the split 'world_train'"):
        metric_of(tracks, small_world, "world_train").compute()
    with pytest.raises(ValueError, match="names has 'tank'"):
        metric_of({next(iter(tracks)): (boxes[:1], ["tank"], scores[:1], ids[:1])}, small_world).compute()
    open_nuscenes(small_world)
    monkeypatch.setitem(sys.modules, "motmetrics", None)
    for name in [name for name in sys.modules if name.startswith("nuscenes.eval.tracking")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs motmetrics: pip install '.\[nuscenes\]'"):
        metric_of(tracks, small_world).compute()


def test_real_annotations_are_found_perfect(nuscenes_root):
    figures = metric_of(true_tracks(nuscenes_root, "mini_val"), nuscenes_root, "mini_val").compute()
    assert figures["AMOTA"] == 1 and figures["AMOTA/trailer"] is None and figures["IDS"] == 0
