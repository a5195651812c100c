"""Depth as an experiment: its data, its rivals, and a backbone that completion takes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rigfuse.modules.depth.network import DepthOutput
from rigfuse.train import main as program
from rigfuse.train.data.lidar_depth import seen_points
from rigfuse.train.data.map_truth import MapLines
from rigfuse.train.systems import experiment
from rigfuse.train.systems.depth.data import collate
from rigfuse.train.systems.depth.labels import labels_of_points

SMALL = ("data.image_size=32,64", "run.tensorboard=false", "run.log_steps=1", "loader.batch_size=1")


@pytest.fixture(scope="module")
def made(small_world):
    settings = experiment("depth_tiny")
    settings.data.root, settings.data.image_size = str(small_world), (32, 64)
    return settings


def test_samples_have_the_depth_of_their_points(made):
    training, validation = made.build_data()
    sample = validation[0, 1]
    moment = validation.moment(1)
    rig = moment.rig.augmented(validation.augmentations(moment.rig, {}))
    expected = seen_points(moment.points(), rig.image_T_ego, (32, 64), (8, 16)).depths()
    assert sample.images.shape == (1, 6, 3, 32, 64) and sample.images.dtype == torch.uint8
    assert all(torch.equal(level[0], other) for level, other in zip(sample.depths, expected))
    assert (expected[0] > 0).sum() > 20
    epochs = [training[epoch, 0].depths[0] for epoch in (0, 0, 1)]
    assert torch.equal(*epochs[:2]) and not torch.equal(*epochs[1:])  # drawn anew each epoch
    both = collate([training[0, 0], training[0, 1]]).to("cpu")
    assert both.images.shape[0] == 2 and [len(level) for level in both.depths] == [2, 2]


class Told(torch.nn.Module):
    """Says a fixed share more than the truth, and fixed labels."""

    def __init__(self, factor, labels=()):
        super().__init__()
        self.labels = list(labels)
        self.factor, self.gain = factor, torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return DepthOutput([depth * self.factor for depth in batch.depths], self.labels, {})

    def usable(self, depths):
        return (depths >= 2) & (depths <= 60)


@torch.no_grad()
def test_figures_are_what_they_say(made):
    batches = [collate([made.build_data()[1][0, index]]).to("cpu") for index in range(3)]
    for factor, within in ((1.2, 1.0), (1.3, 0.0), (0.75, 0.0)):
        figures = made.evaluate(Told(factor), batches)
        assert set(figures) == set(made.figure_names())
        assert figures["abs_rel"] == pytest.approx(abs(factor - 1), rel=1e-5) and figures["within_25"] == within
        assert figures["abs_rel/8"] == pytest.approx(abs(factor - 1), rel=1e-5)


@torch.no_grad()
def test_cells_are_told_whose_points_they_hold(small_world):
    settings = experiment("depth_objects_tiny")
    settings.data.root, settings.data.image_size = str(small_world), (32, 64)
    validation = settings.build_data()[1]
    sample = validation[0, 0]
    moment = validation.moment(0)
    points, car = moment.points(), settings.model.classes.index("car")
    held = sum(int(box.holds(points).sum()) for box in moment.ego_boxes if box.detection_class == "car")
    labels = labels_of_points(points, settings.model.classes, moment.ego_boxes, None, (60.0, 30.0))
    assert (labels == car).sum() == held > 0
    assert all(torch.equal(label == -2, depth == 0) for label, depth in zip(sample.labels, sample.depths))
    assert car in sample.labels[0]

    batch = collate([sample]).to("cpu")
    right = settings.evaluate(Told(1.2, batch.labels), [batch])["objects/iou"]
    wrong = settings.evaluate(Told(1.2, [label.clamp(max=-1) for label in batch.labels]), [batch])["objects/iou"]
    assert (right, wrong) == (1, 0)


def test_a_class_that_nothing_is_called_is_refused(small_world):
    settings = experiment("depth_objects_tiny")
    settings.data.root, settings.model.classes = str(small_world), ("car", "dividers")
    with pytest.raises(ValueError, match="model.classes has 'dividers'.*divider"):
        settings.build_data()


def test_lines_are_told_where_points_lie_on_the_ground():
    """A divider along x at y = 2.1, a crossing from x = 10 to 14; x ahead, y to the left, places of neither apart."""
    lines = MapLines(
        np.array([0, 1]),
        [np.array([[-30.0, 2.1], [30, 2.1]]), np.array([[10.0, -5], [14, -5], [14, 5], [10, 5], [10, -5]])],
    )
    places = [[0, 2, 0], [-29.9, 2.3, 0.4], [0, 2.6, 0], [0, -2, 0], [12, 0, 0], [12, 2, 0], [0, 2, 0.6], [31, 2, 0]]
    classes = ("car", "divider", "ped_crossing", "boundary")
    labels = labels_of_points(torch.tensor(places), classes, [], lines, (60.0, 30.0))
    assert labels.tolist() == [1, 1, -1, -1, 2, 1, -1, -1]
    assert (labels_of_points(torch.tensor(places), ("car",), [], lines, (60.0, 30.0)) == -1).all()


@torch.no_grad()
def test_the_constants_are_means_of_the_training_samples(made):
    """Geometric ones, over the points of the cell, or of the row."""
    made = replace(made)
    training = made.build_data()[0]
    rows, cells = made._constants("cpu")
    known = torch.cat([training.depths(index)[0] for index in range(3)])
    logs = torch.where(known > 0, known, torch.nan).log()
    seen = (known > 0).any(0)
    torch.testing.assert_close(cells[0][seen], logs.nanmean(0).exp()[seen], rtol=1e-4, atol=0)
    row = logs.movedim(0, 2).flatten(2).nanmean(2).exp()
    measured = row.isfinite()
    torch.testing.assert_close(rows[0][..., 0][measured], row[measured], rtol=1e-4, atol=0)
    assert all(level.isfinite().all() and (level > 1).all() for level in (*rows, *cells))


def test_a_trained_backbone_is_taken_by_completion(small_world, tmp_path, capsys):
    folder = tmp_path / "depth"
    options = [*SMALL, "run.epochs=4", "run.evaluate_epochs=2"]
    arguments = ["--config", "depth_tiny", "--data", str(small_world), "--work-dir", str(folder)]
    program.main([*arguments, "--cfg-options", *options])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0] and lines[-1]["val/abs_rel"] < lines[-1]["val/abs_rel_untrained"]

    settings = experiment("completion_v2_tiny")
    settings.model.backbone.weights = str(folder / "checkpoints" / "best.pt")
    model = settings.build_model()
    trained = torch.load(settings.model.backbone.weights, weights_only=True)["model"]
    assert all(torch.equal(trained[f"backbone.{name}"], value) for name, value in model.backbone.state_dict().items())
    assert settings.remarks(model.requires_grad_(False)) == []
    settings.model.backbone.weights = None
    assert len(settings.remarks(settings.build_model().requires_grad_(False))) == 1


def test_depth_without_scans_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="data.root is empty: depth needs LiDAR scans"):
        program.main(["--config", "depth_tiny", "--work-dir", str(tmp_path / "run")])
