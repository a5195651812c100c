import math

import pytest
import torch
from torch.library import opcheck

from rigfuse.kernels import BackendError, trajectory_importance


def by_walking(points, valid, size, sigma):
    """Independent formulation: the distance to 20,000 points walked along the polyline, in float64."""
    height, width = size
    result = torch.zeros(len(points), height, width, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y], dim=-1).double()
    for n, (row, mask) in enumerate(zip(points.double(), valid)):
        row = row[mask & row.isfinite().all(dim=-1)]
        if len(row) == 0:
            continue
        steps = torch.linspace(0, 1, 5001, dtype=torch.float64)[:, None]
        walked = [row[:1], *(a + steps * (b - a) for a, b in zip(row, row[1:]))]
        distance = torch.cdist(cells.flatten(0, 1)[None], torch.cat(walked)[None]).amin(dim=-1).view(height, width)
        result[n] = torch.exp(-0.5 * (distance / sigma) ** 2)
    return result


def trajectories(device="cpu"):
    """Free, crossing, partly invalid, one point, none, hostile, and repeated points."""
    points = torch.rand(7, 5, 2) * 14 - 1
    valid = torch.ones(7, 5, dtype=torch.bool)
    valid[1, 2] = valid[2, :2] = False
    valid[3] = torch.tensor([False, False, True, False, False])
    valid[4] = False
    points[5, 1, 0], points[5, 3, 1] = math.nan, math.inf
    points[6] = points[6, :1]
    return points.to(device), valid.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(11, 13), (1, 1)])
def test_equals_the_walked_polyline(backend, dtype, size, device, guarded_allocations):
    points, valid = trajectories(device)
    got = trajectory_importance(points.to(dtype), valid, size, sigma=1.7, backend=backend)
    assert got.dtype == torch.float32 and got.shape == (7, *size)
    expected = by_walking(points.cpu(), valid.cpu(), size, 1.7)
    torch.testing.assert_close(got.cpu().double(), expected, atol=2e-5, rtol=0)


def test_strided_and_empty(backend, device):
    points, valid = trajectories(device)
    wide_points = torch.stack([points, -points], dim=3)[..., 0]
    wide_valid = torch.stack([valid, ~valid], dim=2)[..., 0]
    assert not wide_points.is_contiguous() and not wide_valid.is_contiguous()
    call = lambda p, v, size: trajectory_importance(p, v, size, sigma=2.0, backend=backend)  # noqa: E731
    torch.testing.assert_close(call(wide_points, wide_valid, (9, 5)), call(points, valid, (9, 5)), rtol=0, atol=0)
    assert call(points[:0], valid[:0], (9, 5)).shape == (0, 9, 5)
    assert call(points, valid, (0, 5)).shape == (7, 0, 5)
    assert not call(points[:, :0], valid[:, :0], (9, 5)).any()


def test_opcheck_and_full_graph(device):
    from rigfuse.kernels.trajectory_importance import ops

    points, valid = trajectories(device)
    opcheck(ops.trajectory_importance, (points, valid, 9, 5, 2.0))
    for backend in ("torch", "triton"):
        call = lambda p, v: trajectory_importance(p, v, (9, 5), sigma=2.0, backend=backend)  # noqa: B023, E731
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(points, valid), call(points, valid))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(points=torch.zeros(2, 3, 3)), ValueError, r"points has shape \(2, 3, 3\), needs \(N, T, 2\)"),
        (dict(valid=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"valid has shape \(2, 4\)"),
        (
            dict(points=torch.zeros(2, 3, 2, dtype=torch.float16)),
            TypeError,
            "points is float16, needs float32, float64",
        ),
        (dict(valid=torch.ones(2, 3)), TypeError, "valid is float32, needs bool"),
        (dict(sigma=0.0), ValueError, "sigma is 0.0"),
        (dict(sigma=math.nan), ValueError, "sigma is nan"),
        (dict(size=(3, -1)), ValueError, "size is"),
        (dict(points=torch.zeros(2, 3, 2, requires_grad=True)), ValueError, "points requires grad"),
        (dict(backend="cuda"), BackendError, "'cuda'; choose one of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(points=torch.zeros(2, 3, 2), valid=torch.ones(2, 3, dtype=torch.bool), size=(4, 5), sigma=1.0)
    with pytest.raises(error, match=message):
        trajectory_importance(**{**arguments, **change})
