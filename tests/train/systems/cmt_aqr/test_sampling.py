"""Objects of other frames in a frame: with their points and pictures, apart from one another, for the first epochs."""

from dataclasses import replace

import numpy as np
import torch

from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig
from rigfuse.train.data import open_drives
from rigfuse.train.systems.cmt_aqr.data import DetectionConfig, DetectionSamples
from rigfuse.train.systems.cmt_aqr.sampling import MIXED, QUOTAS, Frame, inside_boxes, put_objects

RIG = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.1, crop=(0, 0, 160, 90)))


def frame(places, labels, color, seed):
    """Boxes of 4 × 2 × 1.5 m at places (x, y), each with points, before images of one colour."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.zeros(len(places), 9)
    boxes[:, :2], boxes[:, 2] = torch.tensor(places), 1.0
    boxes[:, 3:6], boxes[:, 6] = torch.tensor([4.0, 2.0, 1.5]), 0.3
    xyz = boxes[:, None, :3] + (torch.rand(len(places), 20, 3, generator=generator) - 0.5) * 0.8
    points = torch.cat([xyz.flatten(0, 1), torch.full((20 * len(places), 2), float(seed))], dim=1)
    images = torch.full((6, 3, 90, 160), color, dtype=torch.uint8)
    return Frame(images, RIG.image_T_ego, points, boxes, torch.tensor(labels))


def test_objects_come_with_their_points_and_pictures_and_do_not_overlap():
    into = frame([(10.0, 0.0), (20.0, 5.0)], [0, 0], 0, 1)
    into.points = torch.cat([into.points, torch.tensor([[15.0, -5.0, 1.0, 1.0, 1.0]])])  # where one will stand
    donor = frame([(11.0, 1.0), (15.0, -5.0), (-12.0, 3.0), (30.0, 0.0)], [1, 2, 1, 0], 200, 2)
    found = put_objects(into, [donor], np.random.default_rng(0))
    # The first overlaps, and of cars there are as many as there may be.
    assert sorted(found.labels.tolist()) == [0, 0, 1, 2] and QUOTAS[0] == 2
    assert {tuple(box[:2].tolist()) for box in found.boxes[2:]} == {(15.0, -5.0), (-12.0, 3.0)}
    counts = inside_boxes(found.points, found.boxes).sum(1)
    assert counts.tolist() == [20] * 4
    inside = inside_boxes(found.points, found.boxes[2:]).any(0)
    assert (found.points[inside, 4] == 2).all() and (found.points[~inside, 4] == 1).all()
    changed = found.images.amax(1) > 0  # (6, 90, 160)
    assert set(found.images.unique().tolist()) == {0, int(MIXED * 200)}
    for x, y, z in ((15.0, -5.0, 1.0), (-12.0, 3.0, 1.0)):
        u, v, depth = (RIG.image_T_ego[:, :3] @ torch.tensor([x, y, z, 1.0], dtype=torch.float64)).unbind(1)
        seen = (depth > 1) & (u > 0) & (u < 159 * depth) & (v > 0) & (v < 89 * depth)
        assert seen.any()
        for camera in seen.nonzero()[:, 0].tolist():
            assert changed[camera, int(v[camera] / depth[camera]), int(u[camera] / depth[camera])]


def test_nothing_is_put_where_there_is_nothing():
    into = frame([(10.0, 0.0)], [0], 0, 1)
    assert put_objects(into, [], np.random.default_rng(0)) is into
    empty = replace(into, boxes=torch.empty(0, 9), labels=torch.empty(0, dtype=torch.int64), points=torch.empty(0, 5))
    found = put_objects(empty, [into], np.random.default_rng(0))
    assert torch.equal(found.boxes, into.boxes) and len(found.points) == 20


def test_it_ends_after_the_epochs_that_the_settings_name(small_world):
    drives = open_drives(small_world)[:1]
    config = DetectionConfig(image_size=(16, 40), sweeps=1, cbgs=False, sampled_epochs=1, donors=2)
    with_sampling, without = (
        DetectionSamples(drives, replace(config, sampled_epochs=epochs), training=True) for epochs in (1, 0)
    )
    for epoch in (0, 1):
        pairs = [(with_sampling[epoch, index], without[epoch, index]) for index in range(3)]
        more = sum(len(a.boxes[0]) - len(b.boxes[0]) for a, b in pairs)
        assert (more > 0) == (epoch == 0)
        if epoch:
            assert all(torch.equal(a.images, b.images) and torch.equal(a.points[0], b.points[0]) for a, b in pairs)
    again = with_sampling[0, 1]
    assert torch.equal(again.boxes[0].nan_to_num(), with_sampling[0, 1].boxes[0].nan_to_num())
