"""The grid: where cells lie, and that a warp by it moves whole cells exactly."""

import math

import pytest
import torch

from rigfuse.kernels import bev_warp
from rigfuse.modules.static_bev.grid import BevGrid, GridConfig

GRID = BevGrid((-3.2, 3.2), (-3.2, 3.2), 0.8)


def pose(yaw=0.0, x=0.0, y=0.0):
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    matrix[:2, 3] = torch.tensor([x, y])
    return matrix


def test_the_documents_grid():
    config = GridConfig()
    assert config.features().shape == (56, 104) and config.labels().shape == (224, 416)
    assert config.labels().centres()[0, 0].tolist() == pytest.approx([-20.7, -22.3])
    points = config.labels().centres()
    u, v = config.labels().cells(points).unbind(-1)
    assert torch.allclose(u, torch.arange(416.0).double().expand(224, -1), atol=1e-9)
    assert torch.allclose(v, torch.arange(224.0).double()[:, None].expand(-1, 416), atol=1e-9)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_identity_whole_cells_quarter_turns_and_there_and_back(mode):
    maps = torch.randn(1, 3, *GRID.shape)
    warp = lambda maps, then_T_now: bev_warp(maps, GRID.warp(then_T_now)[None], mode=mode)  # noqa: E731
    same = torch.equal if mode == "nearest" else lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert same(warp(maps, pose())[0], maps)
    # The car was two cells behind and one to the right: what it saw at (x, y) is now at (x − 1.6, y − 0.8).
    moved, seen = warp(maps, pose(x=1.6, y=0.8))
    assert same(moved[..., :-1, :-2], maps[..., 1:, 2:]) and not seen[..., -1, :].any() and seen[..., :-1, :-2].all()
    # It has turned left by a quarter since: what was ahead of it is now to its right.
    turned, _ = warp(maps, pose(yaw=math.pi / 2))
    assert same(turned, maps.rot90(1, (2, 3))) and same(turned[0, :, 0, 4], maps[0, :, 4, 7])
    there = pose(yaw=math.pi / 2, x=0.8, y=-1.6)
    back, seen = warp(warp(maps, there)[0], torch.linalg.inv(there))
    assert same(back[..., 2:, 1:][..., :4, :4], maps[..., 2:, 1:][..., :4, :4]) and seen.any()


def test_poses_far_from_the_origin_keep_their_centimetres():
    world_T_then = pose(0.3, 1.0e6, -2.0e6)
    world_T_now = world_T_then @ pose(x=0.8)
    assert torch.allclose(GRID.warp(torch.linalg.inv(world_T_then) @ world_T_now), GRID.warp(pose(x=0.8)), atol=1e-4)
    with pytest.raises(TypeError, match="float64"):
        GRID.warp(pose().float())


def test_a_range_that_is_no_whole_number_of_cells_is_refused():
    with pytest.raises(ValueError, match="x is .* needs a whole number of cells"):
        BevGrid((0.0, 1.0), (0.0, 1.0), 0.3)
    with pytest.raises(ValueError, match="z is .* needs to rise"):
        GridConfig(z=(5.0, -3.0)).validate()
