"""Drives in the frame of released SparseDrive weights: the same drives, seen from the LiDAR."""

from dataclasses import replace

import pytest
import torch

from rigfuse.modules.sparse_drive.head import HeadConfig, as_upstream
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.baselines import results_of_truth
from rigfuse.train.systems.sparse_drive.data import build_driving
from rigfuse.train.systems.sparse_drive.evaluate import DrivingFigures, Seen
from rigfuse.train.systems.sparse_drive.frames import turned_paths

PLAIN, UPSTREAM = "sparsedrive_small_stage2", "sparsedrive_small_stage2_upstream"


@pytest.fixture(scope="module")
def both(small_world, tmp_path_factory):
    """Settings, training set and validation set in the ego frame and in the LiDAR's."""
    cache, found = str(tmp_path_factory.mktemp("cache")), []
    for name in (PLAIN, UPSTREAM):
        made = experiment(f"{name}_tiny")
        made.data.root, made.data.cache, made.data.image_size = str(small_world), cache, (36, 64)
        made.data.mirror = False
        found.append((made, *build_driving(made.data, made.model, 0)))
    return found


def test_what_is_seen_stays_where_it_is_in_the_images(both):
    """Boxes and depth; x is right, y ahead, and the vehicle moves as before."""
    (_, plain, _), (_, lidar, _) = both
    a, b = plain[0, 0], lidar[0, 0]
    assert torch.equal(a.images, b.images) and all(map(torch.equal, a.depth, b.depth))
    seen = []
    for item in (a, b):
        boxes = item.truth.boxes[0]
        points = torch.cat([boxes[:, :3], torch.ones(len(boxes), 1)], dim=1).double()
        ahead = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin(), *[torch.zeros(len(boxes))] * 2], dim=1).double()
        seen.append(torch.cat([f.image_T_ego[0] @ p.T for f in item.frames[-1:] for p in (points, points + ahead)]))
    torch.testing.assert_close(*seen, rtol=0, atol=2e-2 * 64)  # the LiDAR leans a little: a box stays upright
    torch.testing.assert_close(seen[0][:6], seen[1][:6], rtol=1e-4, atol=1e-3)
    assert b.ego_T_frame[0, 1, 0].abs() > 0.9  # a quarter turn
    way = [item.truth.ego_future[0].sum(0) for item in (a, b)]
    assert way[0][0] > 1 and way[1][1] > 1  # ahead
    torch.testing.assert_close(way[0].norm(), way[1].norm(), rtol=0.05, atol=0.05)
    assert torch.equal(a.truth.command, b.truth.command) and len(a.truth.lines[0]) == len(b.truth.lines[0])


def test_truth_is_right_in_either_frame(both):
    """Figures are about the ego frame, whatever the head's is: the same boxes, no error of a plan."""
    found = []
    for settings, _, validation in both:
        figures = DrivingFigures(settings, settings.model.head)
        for index in range(len(validation)):
            item = validation[0, index].to("cpu")
            item.truth.ego_future_known[:] = True  # so short a drive has no whole future
            figures.add(Seen(item, 0, results_of_truth(item.truth, 0), None))
        found.append(figures)
    for token, plain in found[0].detections.items():
        lidar = found[1].detections[token]
        torch.testing.assert_close(plain.boxes[:, :6], lidar.boxes[:, :6], rtol=1e-4, atol=1e-3)
        turn = plain.boxes[:, 6] - lidar.boxes[:, 6]
        assert torch.atan2(turn.sin(), turn.cos()).abs().max() < 0.02
        assert (plain.boxes[:, 7:] - lidar.boxes[:, 7:]).norm(dim=1).max() < 0.1
    for figures in found:
        plan = figures.plans[""].compute()
        assert plan["samples"] == 3 and plan["L2/mean"] < 1e-5 and plan["collision/mean"] == 0
        still = figures.plans["standing still"].compute()
        assert still["L2/mean"] > 1
    motion = [figures.motion.compute() for figures in found]
    assert motion[0].keys() == motion[1].keys()


def test_a_path_ahead_of_the_lidar_leads_ahead_of_the_vehicle():
    """The LiDAR's y is ahead, its x right; the ego frame's x is ahead, its y left."""
    ego_T_lidar = torch.eye(4, dtype=torch.float64)
    ego_T_lidar[:2, :2] = torch.tensor([[0.0, 1], [-1, 0]])
    path = torch.tensor([[0.0, 5], [1, 10]])
    assert torch.equal(turned_paths(path, ego_T_lidar), torch.tensor([[5.0, 0], [10, -1]]))


def test_released_weights_fit_their_configuration():
    head = experiment(UPSTREAM).model.head
    assert head == as_upstream(HeadConfig())
    assert experiment(f"{UPSTREAM[:-9]}_v2_upstream").data.frame == "lidar"
    with pytest.raises(ValueError, match="frame is 'lidar', mirror needs 'ego'"):
        replace(experiment(UPSTREAM).data, mirror=True).validate()
