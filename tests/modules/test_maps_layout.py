import math

import pytest
import torch

from rigfuse.modules.maps_layout import MapLayout
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig

NAN, INF = math.nan, math.inf
RIG = nuscenes_like_rig()
# As system C sees it: 1600×900 to 800×450, the lower 320 rows; 20×50 cells of 16 pixels.
RESIZE, TOP, STRIDE = 0.5, 130, 16
SMALL_IMAGES = RIG.augmented(ImageAugmentation(resize=RESIZE, crop=(0, TOP, 800, 320)))
IMAGE_T_EGO = SMALL_IMAGES.image_T_ego[None]
FRONT, BACK = (1 + RIG.index(name) for name in ("CAM_FRONT", "CAM_BACK"))


def point(*xyz):
    return torch.tensor(xyz, dtype=torch.float32).view(1, 1, 3)


def test_a_point_ahead_is_in_the_front_camera():
    cells = MapLayout().cells(point(20.0, 0.0, 1.5), IMAGE_T_EGO)
    assert cells.shape == (1, 1, 7, 2) and cells.dtype == torch.float32
    # At the camera's height: the image's middle (799.5, 449.5), resized (399.5, 224.5), cropped (399.5, 94.5).
    torch.testing.assert_close(cells[0, 0, FRONT], torch.tensor([400 / 16 - 0.5, 95 / 16 - 0.5]))
    torch.testing.assert_close(cells[0, 0, 0], torch.tensor([71.2 / 0.8 - 0.5, 51.2 / 0.8 - 0.5]))
    assert cells[0, 0].isfinite().all(-1).nonzero()[:, 0].tolist() == [0, FRONT]
    behind = MapLayout().cells(point(-20.0, 0.0, 1.5), IMAGE_T_EGO)
    assert behind[0, 0].isfinite().all(-1).nonzero()[:, 0].tolist() == [0, BACK]


def expected_cell(camera, xyz):
    """A point's cell on the camera's map, step by step."""
    right, down, forward, _ = (camera.cam_T_ego @ torch.tensor([*xyz, 1.0], dtype=torch.float64)).tolist()
    if not forward > 0.1:
        return None
    (focal_x, _, u0), (_, focal_y, v0) = camera.intrinsics[:2].tolist()
    u, v = focal_x * right / forward + u0, focal_y * down / forward + v0
    u, v = (u + 0.5) * RESIZE - 0.5, (v + 0.5) * RESIZE - 0.5 - TOP
    if not (-0.5 <= u < 799.5 and -0.5 <= v < 319.5):
        return None
    return (u + 0.5) / STRIDE - 0.5, (v + 0.5) / STRIDE - 0.5


def test_cells_equal_an_independent_projection():
    points = torch.rand(1, 300, 3) * torch.tensor([120.0, 120.0, 8.0]) - torch.tensor([60.0, 60.0, 3.0])
    cells = MapLayout().cells(points, IMAGE_T_EGO[:, :, :3])
    seen = 0
    for i, xyz in enumerate(points[0].tolist()):
        column, row = (xyz[0] + 51.2) / 0.8 - 0.5, (xyz[1] + 51.2) / 0.8 - 0.5
        on_bev = max(abs(xyz[0]), abs(xyz[1])) < 51.2
        places = [(column, row) if on_bev else None, *(expected_cell(camera, xyz) for camera in RIG.cameras)]
        seen += sum(place is not None for place in places[1:])
        expected = torch.tensor([place or (NAN, NAN) for place in places])
        torch.testing.assert_close(cells[0, i], expected, rtol=0, atol=1e-4, equal_nan=True)
    assert seen > 200


def test_the_edges_of_the_maps():
    layout = MapLayout((4, 8), (4, 8), cameras=1, point_range=(0, 0, 0, 8, 8, 8))
    image_T_ego = torch.eye(4, dtype=torch.float64)[None, None]  # pixel (x/z, y/z), depth z
    x = [-0.5, 127.4, 127.5, 0.0, 0.0, 0.0]
    y = [-0.5, 63.4, 10.0, 63.5, -0.6, 5.0]
    pixels = torch.tensor([x, y, [1.0] * 6]).T[None]
    on_view = layout.cells(pixels, image_T_ego)[0, :, 1].isfinite().all(-1)
    assert on_view.tolist() == [True, True, False, False, False, True]
    depths = point(0.0, 0.0, 1.0) * torch.tensor([0.1, 0.11, -1.0, 0.0], dtype=torch.float64)[None, :, None]
    assert layout.cells(depths, image_T_ego)[0, :, 1, 0].isfinite().tolist() == [False, True, False, False]
    bev = torch.tensor(
        [[0.0, 0, 1], [7.9, 7.9, 1], [8, 1, 1], [1, 8, 1], [-0.1, 1, 1], [1, 1, 99], [1, 1, NAN], [INF, 1, 1]]
    )
    on_bev = layout.cells(bev[None], image_T_ego)[0, :, 0]
    assert on_bev.isfinite().all(-1).tolist() == [True, True, False, False, False, True, False, False]
    torch.testing.assert_close(on_bev[:2], torch.tensor([[-0.5, -0.5], [7.4, 3.45]]))


def test_cells_are_no_part_of_the_graph():
    reference = point(20.0, 0.0, 1.5).requires_grad_()
    assert not MapLayout().cells(reference, IMAGE_T_EGO).requires_grad


@pytest.mark.parametrize(
    "reference, image_T_ego, error, message",
    [
        (torch.zeros(1, 3), IMAGE_T_EGO, ValueError, r"the points have shape \(1, 3\), need \(B, N, 3\)"),
        (torch.zeros(2, 5, 3), IMAGE_T_EGO, ValueError, r"shape \(1, 6, 4, 4\), needs \(2, V, 3 or 4, 4\)"),
        (torch.zeros(1, 5, 3), IMAGE_T_EGO.float(), TypeError, "image_T_ego is float32, needs float64"),
        (torch.zeros(1, 5, 3), IMAGE_T_EGO[:, :5], ValueError, "image_T_ego has 5 cameras, needs 6"),
    ],
)
def test_geometry_that_does_not_fit(reference, image_T_ego, error, message):
    with pytest.raises(error, match=message):
        MapLayout().cells(reference, image_T_ego)


def test_references_span_the_range():
    layout = MapLayout(point_range=(-2.0, 0.0, -3.0, 2.0, 10.0, 5.0))
    reference = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.25, 0.5, 0.75]])
    assert layout.metres(reference).tolist() == [[-2.0, 0.0, -3.0], [2.0, 10.0, 5.0], [-1.0, 5.0, 3.0]]
    with pytest.raises(ValueError, match="point_range is .* each minimum below its maximum"):
        MapLayout(point_range=(0, 0, 0, 1, 0, 1)).metres(reference)
