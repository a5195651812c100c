"""Cameras, augmentations and relative projections: a wrong convention moves something."""

import math

import pytest
import torch

from rigfuse.kernels import multi_depth_warp
from rigfuse.modules.rig import (
    NUSCENES_CAMERAS,
    Camera,
    ImageAugmentation,
    Rig,
    RigFrame,
    cell_T_image,
    nuscenes_like_rig,
    relative_projection,
)

EYE = torch.eye(4, dtype=torch.float64)
AUGMENTATIONS = [
    ImageAugmentation(),
    ImageAugmentation(resize=0.44),
    ImageAugmentation(resize=0.313, crop=(-7, 40, 480, 230)),
    ImageAugmentation(crop=(100, 50, 901, 701), flip=True),
    ImageAugmentation(resize=0.5, crop=(10, 90, 700, 320), flip=True, rotation=5.4),
]


def move(yaw=0.0, x=0.0, y=0.0, z=0.0):
    cos, sin = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[cos, -sin, 0, x], [sin, cos, 0, y], [0, 0, 1, z], [0, 0, 0, 1]], dtype=torch.float64)


def project(matrix, points):
    """(N, 4) through (3 or 4, 4): pixels (N, 2) and depth (N,)."""
    image = points @ matrix.T
    return image[:, :2] / image[:, 2:3], image[:, 2]


def points_before(camera, count=50):
    """Homogeneous ego points that `camera` sees, 2 to 60 m away."""
    uv = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([camera.width, camera.height]) - 0.5
    depth = 2 + 58 * torch.rand(count, 1, dtype=torch.float64)
    image = torch.cat([uv * depth, depth, torch.ones_like(depth)], dim=1)
    return image @ torch.linalg.inv(camera.image_T_ego).T, uv, depth[:, 0]


def test_nuscenes_like_rig_looks_where_its_names_say():
    rig = nuscenes_like_rig()
    assert rig.names == NUSCENES_CAMERAS
    for name, point in {
        "CAM_FRONT": (20, 0, 1.5),
        "CAM_FRONT_LEFT": (12, 15, 1.5),
        "CAM_FRONT_RIGHT": (12, -15, 1.5),
        "CAM_BACK_LEFT": (-6, 20, 1.5),
        "CAM_BACK_RIGHT": (-6, -20, 1.5),
        "CAM_BACK": (-20, 0, 1.5),
    }.items():
        uv, depth = project(rig[name].image_T_ego, torch.tensor([[*point, 1.0]], dtype=torch.float64))
        assert depth > 10 and abs(uv[0, 0] - 799.5) < 250 and abs(uv[0, 1] - 449.5) < 30, name
    left_and_up = torch.tensor([[20, 1, 2.5, 1]], dtype=torch.float64)
    u, v = project(rig["CAM_FRONT"].image_T_ego, left_and_up)[0][0]
    assert u < 799.5 and v < 449.5


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_an_augmented_rig_projects_to_the_augmented_pixel(augmentation):
    for camera, augmented in zip(nuscenes_like_rig().cameras, nuscenes_like_rig().augmented(augmentation).cameras):
        points, uv, depth = points_before(camera)
        expected = torch.cat([uv, torch.ones(len(uv), 1)], dim=1) @ augmentation.matrix(1600, 900).T
        found, found_depth = project(augmented.image_T_ego, points)
        torch.testing.assert_close(found, expected[:, :2], rtol=0, atol=1e-8)
        torch.testing.assert_close(found_depth, depth)
        assert (augmented.width, augmented.height) == augmentation.size(1600, 900)


def test_augmentation_matrix_moves_corners_and_centres():
    half = ImageAugmentation(resize=0.5).matrix(8, 4)
    corners = torch.tensor([[-0.5, -0.5, 1], [7.5, 3.5, 1]], dtype=torch.float64)
    assert torch.equal(corners @ half.T, torch.tensor([[-0.5, -0.5, 1], [3.5, 1.5, 1]], dtype=torch.float64))
    crop = ImageAugmentation(crop=(2, 1, 5, 3), flip=True).matrix(8, 4)
    assert (crop @ torch.tensor([2.0, 1, 1], dtype=torch.float64)).tolist() == [4, 0, 1]
    # a quarter turn clockwise takes the middle of the right side to the middle of the bottom
    turn = ImageAugmentation(rotation=90).matrix(5, 5)
    torch.testing.assert_close(turn @ torch.tensor([4.0, 2, 1]).double(), torch.tensor([2.0, 4, 1]).double())


def test_one_augmentation_for_each_camera():
    rig = nuscenes_like_rig().augmented({"CAM_BACK": ImageAugmentation(resize=0.5)})
    assert rig["CAM_BACK"].width == 800 and rig["CAM_FRONT"].width == 1600


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_cell_centres(stride):
    cells = torch.tensor([[0, 0, 1], [3, 5, 1]], dtype=torch.float64)
    pixels = (cells + 0.5) * stride - 0.5
    pixels[:, 2] = 1
    torch.testing.assert_close(pixels @ cell_T_image(stride).T, cells)


def test_relative_projection_of_standing_still_is_the_identity():
    image_T_ego = nuscenes_like_rig().image_T_ego
    for stride in (1, 8, 32):
        projection = relative_projection(image_T_ego, image_T_ego, EYE, stride)
        assert projection.dtype == torch.float32 and projection.shape == (6, 3, 4)
        torch.testing.assert_close(projection, torch.eye(3, 4).expand(6, 3, 4), rtol=0, atol=1e-6)
    far_away = move(0.7, 1200, -2400, -13)
    still = torch.linalg.solve(far_away, far_away)
    torch.testing.assert_close(
        relative_projection(image_T_ego, image_T_ego, still, 32), torch.eye(3, 4).expand(6, 3, 4), rtol=0, atol=1e-6
    )


def test_relative_projection_follows_a_point_between_two_cameras_and_moments():
    stride, rig = 16, nuscenes_like_rig().augmented(ImageAugmentation(resize=0.7, crop=(30, 90, 1040, 512), flip=True))
    world_T_now, world_T_past = move(0.8, 812.0, -340.0, 0.4), move(0.75, 809.0, -343.5, 0.3)
    past_T_now = torch.linalg.solve(world_T_past, world_T_now)
    target, source = rig["CAM_FRONT"], rig["CAM_FRONT_LEFT"]
    points, uv, depth = points_before(target)
    cells = (uv + 0.5) / stride - 0.5
    hypothesis = torch.cat([cells * depth[:, None], depth[:, None], torch.ones(len(uv), 1)], dim=1)
    projection = relative_projection(target.image_T_ego, source.image_T_ego, past_T_now, stride)
    found, found_depth = project(projection.double(), hypothesis)
    pixels, past_depth = project(source.image_T_ego, points @ past_T_now.T)
    ahead = past_depth > 1
    torch.testing.assert_close(found_depth, past_depth, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[ahead], ((pixels + 0.5) / stride - 0.5)[ahead], rtol=1e-4, atol=1e-3)


def test_the_warp_of_a_whole_cell_of_motion_is_a_shift():
    """A camera that moves sideways by depth · stride / focal length sees a plane moved by one cell."""
    stride, focal, depth = 8, 100.0, 10.0
    intrinsics = [[focal, 0, 40], [0, focal, 20], [0, 0, 1]]
    axes = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    camera = Camera("CAM", 80, 48, intrinsics, axes)
    now_to_the_right = move(y=-depth * stride / focal)  # the past ego stands at the origin
    projection = relative_projection(camera.image_T_ego, camera.image_T_ego, now_to_the_right, stride)
    features = torch.randn(1, 3, 6, 10)
    warped, coverage = multi_depth_warp(features, projection[None], torch.tensor([depth]))
    torch.testing.assert_close(warped[..., :-1], features[..., 1:], rtol=1e-4, atol=1e-4)
    assert (coverage[..., :-1] > 1 - 1e-4).all() and (coverage[..., -1] < 1e-4).all()


def test_rig_frames_join_and_move():
    rig = nuscenes_like_rig()
    frame = RigFrame.cat([rig.frame(move(x=1), 10.0, "a"), rig.frame(move(x=2), 20.5, "b")])
    assert frame.image_T_ego.shape == (2, 6, 4, 4) and frame.scene == ("a", "b") and frame.batch_size == 2
    assert frame.world_T_ego[1, 0, 3] == 2 and frame.timestamp.tolist() == [10, 20.5]
    assert torch.equal(frame.to("cpu").world_T_ego, frame.world_T_ego)
    copy = frame.clone()
    copy.world_T_ego.zero_()
    assert frame.world_T_ego[1, 0, 3] == 2


def test_bad_input_says_what_is_needed():
    rig = nuscenes_like_rig()
    with pytest.raises(ValueError, match="no camera 'FRONT'; choose one of CAM_FRONT, CAM_FRONT_LEFT"):
        rig.index("FRONT")
    with pytest.raises(ValueError, match="no camera"):
        rig.augmented({"CAM_TOP": ImageAugmentation()})
    with pytest.raises(ValueError, match="unique"):
        Rig([rig["CAM_BACK"], rig["CAM_BACK"]])
    with pytest.raises(ValueError, match=r"intrinsics has shape \(4, 4\), needs \(3, 3\)"):
        Camera("C", 4, 4, EYE, EYE)
    with pytest.raises(ValueError, match=r"needs \(2, 4, 4\) for 2 scenes"):
        RigFrame(rig.image_T_ego.expand(2, 6, 4, 4), EYE[None], torch.zeros(2).double(), ("a", "b"))
    with pytest.raises(TypeError, match="world_T_ego is float32, needs float64"):
        RigFrame(rig.image_T_ego[None], EYE[None].float(), torch.zeros(1).double(), ("a",))
    with pytest.raises(TypeError, match="source is float32, needs float64"):
        relative_projection(EYE, EYE.float(), EYE)
    with pytest.raises(ValueError, match="target has shape"):
        relative_projection(EYE[:3], EYE, EYE)
    for bad in (dict(resize=0), dict(crop=(0, 0, 0, 5)), dict(crop=(0, 0, 5))):
        with pytest.raises(ValueError, match="ImageAugmentation"):
            ImageAugmentation(**bad)
    with pytest.raises(ValueError, match="stride is 0"):
        cell_T_image(0)
