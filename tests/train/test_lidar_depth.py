"""Depth and class targets: pixel conventions, what counts in a cell, augmentation, and the world's own depth."""

import numpy as np
import pytest
import torch

from rigfuse.modules.rig import Camera, ImageAugmentation, Rig
from rigfuse.train.data import open_drives
from rigfuse.train.data.lidar_depth import seen_points

SIZE = (24, 40)
# Looks along the ego frame's x; focal length 10 pixels; the optical axis meets pixel (19.5, 11.5), the image's middle.
CAM_T_EGO = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
CAMERA = Camera("CAM_FRONT", 40, 24, [[10.0, 0, 19.5], [0, 10, 11.5], [0, 0, 1]], CAM_T_EGO)
IMAGE_T_EGO = Rig((CAMERA,)).image_T_ego


def point(u, v, depth):
    """The ego point that is seen at a pixel."""
    return [depth, -(u - 19.5) / 10 * depth, -(v - 11.5) / 10 * depth, 0.5, 0.0]


def levels(points, strides=(4, 8), **settings):
    return seen_points(torch.tensor(points).reshape(-1, 5), IMAGE_T_EGO, SIZE, strides, **settings).depths()


def test_cells_begin_half_a_pixel_before_their_first_pixel():
    for u, column in ((-0.49, 0), (3.49, 0), (3.51, 1), (39.49, 9)):
        for v, row in ((-0.49, 0), (11.51, 3), (23.49, 5)):
            fine, coarse = levels([point(u, v, 7.0)])
            assert fine.shape == (1, 6, 10) and coarse.shape == (1, 3, 5)
            assert fine[0, row, column] == pytest.approx(7.0) and (fine > 0).sum() == 1
            assert coarse[0, row // 2, column // 2] == pytest.approx(7.0)


def test_the_nearest_point_of_a_cell_counts_and_what_is_outside_does_not():
    seen = [point(5, 5, depth) for depth in (9.0, 3.0, 5.0)]
    unseen = [point(-0.51, 5, 2.0), point(39.51, 5, 2.0), point(5, 23.51, 2.0), point(9, 9, 60.1), point(13, 13, 0.05)]
    behind, broken = [-1.0, 0, 0, 0, 0], [float("nan")] * 5
    fine, _ = levels([*seen, *unseen, behind, broken])
    assert fine[0, 1, 1] == pytest.approx(3.0) and (fine > 0).sum() == 1
    far = levels([point(5, 5, 60.1)], farthest=80.0)[0]
    assert far.max() == pytest.approx(60.1) and far.dtype == torch.float32
    assert (levels([])[0] == 0).all()
    assert levels([point(39, 23, 4.0)], strides=(32,))[0].tolist() == [[[0.0, pytest.approx(4.0)]]]  # a part of a cell


def test_objects_come_before_what_they_stand_on():
    """In the cell of pixel (5, 5) something without a label is nearest, in that of (9, 5) there is nothing else."""
    points = [point(5, 5, 3.0), point(5, 6, 8.0), point(6, 5, 7.0), point(9, 5, 4.0), point(13, 5, 60.1)]
    places = dict(image_T_ego=IMAGE_T_EGO, size=SIZE, strides=(4, 8))
    fine, coarse = seen_points(torch.tensor(points), **places).labels(torch.tensor([-1, 2, 1, -1, 0]))
    assert fine.shape == (1, 6, 10) and coarse.shape == (1, 3, 5) and fine.dtype == torch.int64
    assert fine[0, 1, :4].tolist() == [-2, 1, -1, -2] and (fine > -2).sum() == 2
    assert coarse[0, 0, :2].tolist() == [1, -1]
    nothing = seen_points(torch.zeros(0, 5), **places).labels(torch.zeros(0, dtype=torch.int64))
    assert all((level == -2).all() for level in nothing)


def test_classes_are_those_of_a_loop_over_points():
    rng = torch.Generator().manual_seed(0)
    u, v, depth = (torch.rand(90, generator=rng) * torch.tensor(high) for high in (39.0, 23.0, 50.0))
    points = torch.tensor([point(*each) for each in zip(u.tolist(), v.tolist(), (depth + 1).tolist())])
    labels = torch.randint(-1, 3, (90,), generator=rng)
    (found,) = seen_points(points, IMAGE_T_EGO, SIZE, (4,)).labels(labels)
    expected = torch.full((1, 6, 10), -2)
    for place in (depth + (labels < 0) * 1000).argsort(descending=True).tolist():
        expected[0, int((v[place] + 0.5) // 4), int((u[place] + 0.5) // 4)] = labels[place]
    assert torch.equal(found, expected) and {-2, -1, 0, 1, 2} == set(found.flatten().tolist())


def test_augmented_images_have_the_depths_where_their_pixels_are():
    rng = torch.Generator().manual_seed(0)
    uv = torch.rand(50, 2, generator=rng) * torch.tensor([39.0, 23.0])
    points = torch.tensor([point(u, v, 5 + i) for i, (u, v) in enumerate(uv.tolist())])
    augmentation = ImageAugmentation(resize=2.0, crop=(10, 4, 64, 40), flip=True)
    rig = Rig((CAMERA,)).augmented(augmentation)
    (target,) = seen_points(points, rig.image_T_ego, (40, 64), (1,)).depths()
    matrix = augmentation.matrix(40, 24)
    places = torch.cat([uv.double(), torch.ones(50, 1)], 1) @ matrix.T
    for (u, v), depth in zip(places[:, :2].round().long().tolist(), range(5, 55)):
        if 0 <= u < 64 and 0 <= v < 40:
            assert 0 < target[0, v, u] <= depth + 1e-4


def test_the_generated_worlds_points_lie_at_the_pictures_depth(small_world):
    """Against the depth that the world writes beside its images."""
    from PIL import Image

    moment, errors = open_drives(small_world)[0][1], []
    height, width = moment.image("CAM_FRONT").shape[1:]
    (target,) = seen_points(moment.points(), moment.rig.image_T_ego, (height, width), (1,)).depths()
    for camera, own in zip(moment.rig.cameras, target):
        file = moment.images[camera.name]
        with Image.open(small_world / "depth" / camera.name / f"{file.stem}.png") as image:
            depth = torch.from_numpy(np.array(image).astype(np.float32) / 256)
        hit = own > 0
        errors.append((own[hit] / depth[hit] - 1).abs())
    errors = torch.cat(errors)
    assert len(errors) > 200 and errors.median() < 0.03
