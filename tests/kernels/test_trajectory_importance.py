"""trajectory_importance: what is its own, beside the properties of every operation."""

import math

import pytest
import torch

from rigfuse.kernels import trajectory_importance


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
def test_equals_the_walked_polyline(any_backend, dtype, size, device, guarded_allocations):
    points, valid = trajectories(device)
    got = trajectory_importance(points.to(dtype), valid, size, sigma=1.7, backend=any_backend)
    assert got.dtype == torch.float32 and got.shape == (7, *size)
    expected = by_walking(points.cpu(), valid.cpu(), size, 1.7)
    torch.testing.assert_close(got.cpu().double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sigma", [1.7, 1e30, 1e-20, 1e300, 1e-300])
@pytest.mark.parametrize("size", [1.0, 1e20, 3e38])
def test_huge_points_and_extreme_sigmas(any_backend, size, sigma, device):
    """Never NaN: what is near in sigmas has importance 1, what is far has 0, whatever overflows on the way."""
    points = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 0.5]]], device=device) * size
    valid = torch.ones(2, 2, dtype=torch.bool, device=device)
    result = trajectory_importance(points, valid, (2, 3), sigma=sigma, backend=any_backend)
    assert (result[0, 0, :1] == 1).all()  # the first segment runs through cell (0, 0)
    if 1e38 > sigma > 1e3 * size or (sigma < 1 and size > 1):
        through = torch.tensor([[1.0, 1, 1], [sigma > 1] * 3], device=device)
        expected = torch.stack([through, torch.full_like(through, float(sigma > size))])
        assert torch.equal(result, expected)
    nowhere = trajectory_importance(points, ~valid, (2, 3), sigma=sigma, backend=any_backend)
    assert not nowhere.any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            dict(points=torch.zeros(2, 3, 2, dtype=torch.float16)),
            TypeError,
            "points is float16, needs float32, float64",
        ),
        (dict(sigma=0.0), ValueError, "sigma is 0.0, needs a finite number above 0"),
        (dict(sigma=math.nan), ValueError, "sigma is nan, needs a finite number"),
        (dict(sigma=math.inf), ValueError, "sigma is inf, needs a finite number"),
        (dict(sigma="2"), TypeError, "sigma is a str, needs a number"),
        (dict(sigma=torch.ones(())), TypeError, "sigma is a Tensor, needs a number"),
        (dict(size=(3, -1)), ValueError, r"size is \(3, -1\), needs two integers of at least 0"),
        (dict(size=(3, 1.0)), ValueError, r"size is \(3, 1.0\), needs two integers"),
        (dict(size=7), ValueError, r"size is 7, needs \(height, width\)"),
        (dict(size=(10**9, 10**9)), ValueError, "size is .*, needs at most 2147483647 cells"),
    ],
)
def test_bad_input(change, error, message):
    valid = dict(points=torch.zeros(2, 3, 2), valid=torch.ones(2, 3, dtype=torch.bool), size=(4, 5), sigma=1.0)
    with pytest.raises(error, match=f"^trajectory_importance: {message}"):
        trajectory_importance(**{**valid, **change})
