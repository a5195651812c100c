"""A run is opened by its folder or by a checkpoint."""

import json

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.config import to_dict
from rigfuse.train.run import open_run, read_log, without_weight_files
from rigfuse.train.systems import experiment


@pytest.fixture
def run(tmp_path):
    """Three checkpoints of a network, one of them the best, told apart by one bias; its pretrained weights are gone."""
    settings = experiment("completion_v2_tiny")
    settings.data.image_size = (48, 80)
    weights = settings.build_model().state_dict()
    settings.model.backbone.weights = str(tmp_path / "gone")
    for step in (1, 2, 3):
        weights["temporal.gate.2.bias"] = torch.full((1,), float(step))
        state = dict(model=weights, config=to_dict(settings), counters=dict(step=step))
        path = checkpoint.save(tmp_path / "run" / "checkpoints", step, state, keep=3)
        if step == 2:
            checkpoint.link(path, "best")
    return tmp_path / "run"


def test_a_folder_means_its_best_checkpoint_else_the_last(run):
    opened = open_run(run, data="/data/nuscenes")
    assert (opened.step, opened.folder) == (2, run) and opened.settings.data.root == "/data/nuscenes"
    assert opened.settings.data.image_size == (48, 80) and opened.settings.name == "completion_v2_tiny"
    assert opened.build_model().temporal.gate[2].bias.item() == 2
    assert opened.settings.model.backbone.weights == str(run.parent / "gone")  # as the run had it
    assert open_run(run / "checkpoints" / "step-00000001.pt").step == 1
    (run / "checkpoints" / "best.pt").unlink()
    assert open_run(run).step == 3


def test_what_is_no_run_is_said_in_one_line(run, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"last.pt does not exist; there is no other$"):
        open_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run: it has no log.jsonl"):
        read_log(run)
    (run / "log.jsonl").write_text(json.dumps(dict(step=1)) + "\n")
    assert read_log(run) == [dict(step=1)]


def test_weight_files_are_left_out_of_a_copy():
    settings = experiment("cmt_aqr_voxel0100_r50_800x320_cbgs")
    settings.model.camera.weights = "resnet"
    assert without_weight_files(settings).model.camera.weights is None and settings.model.camera.weights == "resnet"
