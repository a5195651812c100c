"""The record of detectors: what stands in it, the baselines that look at nothing, and when there is a verdict."""

import json
from pathlib import Path

import pytest
import torch

from rigfuse.modules.detection.boxes import DETECTION_CLASSES, Detections
from rigfuse.train import checkpoint
from rigfuse.train.config import to_dict
from rigfuse.train.data.splits import drives_of_splits
from rigfuse.train.metrics.detection import FIGURES
from rigfuse.train.record import RecordOptions, Run
from rigfuse.train.run import open_run
from rigfuse.train.systems import experiment
from rigfuse.train.systems.cmt_aqr import record
from rigfuse.train.systems.cmt_aqr.data import DetectionSamples
from rigfuse.train.systems.cmt_aqr.routing import BINS, BOTH

TINY = "voxel0100_r50_800x320_cbgs_tiny"


def saved(folder: Path, name: str, root) -> Run:
    torch.manual_seed(0)
    settings = experiment(name)
    settings.data.root, settings.data.image_size, settings.model.queries = str(root), (32, 64), 20
    state = dict(model=settings.build_model().state_dict(), config=to_dict(settings), counters=dict(step=3))
    checkpoint.save(folder / "checkpoints", 3, state, keep=1)
    return Run(folder, open_run(folder), [])


def test_the_sections_of_two_runs(small_world, tmp_path, monkeypatch):
    seen = []

    def official(found, *_):
        seen.append(found)
        return dict.fromkeys(FIGURES, len(seen) / 100)

    every = record.inputs(("CAM_FRONT", "CAM_BACK"))
    assert set(every) == {*record.INPUTS, "no CAM_FRONT", "no CAM_BACK"}
    some = {name: every[name] for name in (BOTH, "no image", "no LiDAR", "no CAM_FRONT")}
    monkeypatch.setattr(record, "evaluate_detection", official)
    monkeypatch.setattr(record, "inputs", lambda cameras: some)
    runs = [saved(tmp_path / name, f"{name}_{TINY}", small_world) for name in ("cmt", "cmt_aqr")]
    text = "\n".join(record.sections(runs, tmp_path, RecordOptions(8, torch.device("cpu"))))
    head = "| figure | untrained | by heart | cmt_voxel"
    assert head in text and all(f"| {name} |" in text for name in (*BINS[:3], "small", "no LiDAR"))
    assert f"cmt_aqr_{TINY}: small objects do not collapse" in text and "0 of" not in text
    assert text.count("cannot tell: 1 of 3 seeds") == 2
    assert len(seen) == 2 * 4 + 2 and all(len(found) == 3 for found in seen)
    whole, blind, deaf, front, *_ = ([x.boxes for x in found.values()] for found in seen)
    assert not any(torch.equal(a, b) for other in (blind, deaf, front) for a, b in zip(whole, other))
    assert set(json.loads((tmp_path / "detection.json").read_text())["runs"]) == {"cmt", "cmt_aqr"}
    assert "| no image | 0.020 | 0.060 |" in text and "| no CAM_BACK |" not in text


def test_the_boxes_of_training_by_heart(small_world):
    data = experiment(f"cmt_{TINY}").data
    data.root = str(small_world)
    training, validation = (DetectionSamples(drives, data, False) for drives in drives_of_splits(data))
    found = record.by_heart(training, validation)
    assert found.keys() == {validation.moment(place).token for place in range(3)}
    # Of training itself they know where something is, and their scores say in how many of three frames.
    said = next(iter(found.values()))
    assert set(said.scores.mul(3).round().tolist()) <= {1.0, 2.0, 3.0} and said.scores.diff().max() <= 0
    for place in range(3):
        item = training[0, place]
        near = torch.cdist(item.boxes[0][:, :2], said.boxes[:, :2]) < 3
        assert (near & (item.labels[0][:, None] == said.labels)).any(1).all()


def test_boxes_count_whatever_their_class(small_world):
    data = experiment(f"cmt_{TINY}").data
    data.root = str(small_world)
    samples = DetectionSamples(drives_of_splits(data)[1], data, False)
    truth = [samples.targets(samples.moment(place))[0] for place in range(len(samples.places))]

    def ap(move=0.0, wrong=0):
        """Of the truth, moved along x, each box said for two classes, below some that are far from everything."""
        found = {}
        for place, boxes in enumerate(truth):
            said = boxes.nan_to_num().repeat_interleave(2, 0)
            said[:, 0] += move
            far = torch.zeros(wrong, 9)
            far[:, 0], far[:, 1] = torch.arange(wrong) * 0.01, -48.0  # the truth is within 38.4 m
            scores = torch.cat([torch.full((wrong,), 0.9), torch.linspace(0.8, 0.1, len(said))])
            labels = torch.zeros(wrong + len(said), dtype=torch.int64)
            found[samples.moment(place).token] = Detections(torch.cat([far, said]), scores, labels)
        return list(record.any_class(found, samples).values())

    objects = sum(len(boxes) for boxes in truth)
    assert objects > 3 and ap() == [1.0, 1.0, 1.0]
    near, wide = ap(move=1.5)[0], ap(move=1.5)[1]
    assert near < 0.5 and wide > 0.9
    assert all(value < 0.8 for value in ap(wrong=objects))
    assert list(record.any_class({}, samples).values()) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "now, verdict",
    [([0.3, 0.31, 0.29], "holds"), ([0.1, 0.11, 0.09], "does not hold"), ([0.2, 0.3, 0.1], "cannot tell")],
)
def test_a_verdict_needs_more_than_noise(now, verdict):
    scores = {
        name: [{BOTH: dict(mAP=value, small=value)} for value in values]
        for name, values in (("cmt_x", [0.2, 0.21, 0.19]), ("cmt_aqr_x", now))
    }
    rows = record.verdicts(scores)
    assert rows[1][0] == "cmt_aqr_x: mAP is higher" and rows[1][3] == verdict and len(rows) == 3
    assert len(record.verdicts({"cmt_aqr_x": scores["cmt_aqr_x"]})) == 1 and len(DETECTION_CLASSES) == 10
