"""deformable_aggregation: what is its own, beside the properties of every operation."""

import pytest
import torch

from rigfuse.kernels import deformable_aggregation
from rigfuse.kernels.deformable_aggregation import configs
from support.numerics import assert_within_budget

SIZES = ((2, 3), (1, 2))
NAMES = ["out", "level 0", "level 1", "points", "weights"]


def scene(dtype, device, *, batch=2, anchors=2, points=3, cameras=2, channels=12, groups=3, sizes=SIZES):
    """Points in and out of the images, on the border, nowhere; a camera that is not there and holds NaN."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [torch.randn(batch, cameras, channels, *size).to(dtype) for size in sizes]
    places = torch.rand(batch, anchors, points, cameras, 2, dtype=geometry) * 1.3 - 0.15
    places = ((places * 256).floor() + 0.5) / 256  # never at a cell's centre, and exact in float32
    weights = torch.randn(batch, anchors, points, cameras, len(sizes), groups).to(dtype)
    visible = torch.ones(batch, cameras, dtype=torch.bool)
    if batch == anchors == 2 and points > 2:
        places[0, 0, 0] = torch.tensor([[float("nan"), 0.5], [float("inf"), 0.5]])[:cameras]
        places[0, 0, 1] = torch.tensor([[0.0, 0.5], [1e-3, 1.0]])[:cameras]
        places[0, 1, 0] = torch.tensor([[1e-3, 0.999], [0.5, -3e38]])[:cameras]
        visible[1, 0] = False
        for level in maps:
            level[1, 0] = float("nan")
        weights[1, :, :, 0] = float("nan")
    arguments = dict(feature_maps=maps, points=places, weights=weights, visible=visible)
    return {k: [t.to(device) for t in v] if isinstance(v, list) else v.to(device) for k, v in arguments.items()}


def cast(arguments, dtype):
    floats = {k: v.to(dtype) for k, v in arguments.items() if k in ("points", "weights")}
    return arguments | floats | dict(feature_maps=[level.to(dtype) for level in arguments["feature_maps"]])


def with_gradients(arguments, grad=None, **settings):
    """The output and the gradients of all maps, of points and of weights."""
    maps = [level.detach().requires_grad_() for level in arguments["feature_maps"]]
    points, weights = (arguments[name].detach().requires_grad_() for name in ("points", "weights"))
    out = deformable_aggregation(maps, points, weights, visible=arguments["visible"], **settings)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [*maps, points, weights], grad.to(out.dtype))]


def by_hand(feature_maps, points, weights, visible):
    """The rules one number at a time, in float64: nothing of the definition's path through grid_sample."""
    batch, anchors, per_anchor, cameras = points.shape[:4]
    channels, groups = feature_maps[0].shape[2], weights.shape[5]
    out = torch.zeros(batch, anchors, channels, dtype=torch.float64)
    for b, a, p, v in torch.cartesian_prod(*map(torch.arange, (batch, anchors, per_anchor, cameras))).tolist():
        x, y = points[b, a, p, v].tolist()
        if not (0 < x < 1 and 0 < y < 1 and bool(visible[b, v])):
            continue
        for level, maps in enumerate(feature_maps):
            height, width = maps.shape[3:]
            for row in range(height):
                for column in range(width):
                    share = max(0, 1 - abs(x * width - 0.5 - column)) * max(0, 1 - abs(y * height - 0.5 - row))
                    weight = weights[b, a, p, v, level].repeat_interleave(channels // groups)
                    out[b, a] += share * weight * maps[b, v, :, row, column] if share else 0
    return out


def test_the_definition_by_hand():
    arguments = scene(torch.float64, "cpu")
    out = deformable_aggregation(**arguments, backend="definition")
    torch.testing.assert_close(out, by_hand(**arguments))
    assert out.isfinite().all() and out.abs().sum() > 1


def test_against_float64(backend, dtype, device):
    arguments = scene(dtype, device)
    grad = torch.randn(2, 2, 12, device=device).to(dtype)
    actual = with_gradients(arguments, grad, backend=backend)
    exact = with_gradients(cast(arguments, torch.float64), grad, backend="definition")
    plain = with_gradients(cast(arguments, torch.float32), grad, backend="definition")
    assert actual[0].dtype == actual[1].dtype == actual[4].dtype == dtype
    for name, a, e, p in zip(NAMES, actual, exact, plain):
        assert e.isfinite().all(), name  # neither NaN of the camera that is not there gets through
        if dtype == torch.float64:
            torch.testing.assert_close(a, e)
        else:
            assert_within_budget(a, e, p.to(a.dtype), what=name)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1)])
def test_whole_cells_and_borders(backend, size, device):
    """The centre of a cell reads it alone; towards the border half of it is left, and nothing outside counts."""
    height, width = size
    maps = torch.arange(1.0, height * width + 1, device=device).view(1, 1, 1, height, width)
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(u + 0.5) / width, (v + 0.5) / height], -1).view(1, -1, 1, 1, 2).to(device)
    weights = torch.ones(1, centres.shape[1], 1, 1, 1, 1, device=device)
    out = deformable_aggregation([maps], centres, weights, backend=backend)
    torch.testing.assert_close(out.flatten(), maps.flatten())

    edge = torch.tensor([[1e-7, 0.5], [0.0, 0.5], [0.5, 1.0], [float("nan"), 0.5], [0.5, -1e30]], device=device)
    one = torch.ones(1, 5, 1, 1, 1, 1, device=device)
    out = deformable_aggregation([maps], edge.view(1, 5, 1, 1, 2), one, backend=backend)
    middle = maps[0, 0, 0, (height - 1) // 2 : height // 2 + 1, 0].mean()
    torch.testing.assert_close(out.flatten(), torch.tensor([middle / 2, 0, 0, 0, 0], device=device), atol=1e-5, rtol=0)


def test_layouts(backend, device):
    """Strided, expanded and permuted inputs and gradients give what dense ones give."""
    arguments = scene(torch.float32, device)
    arguments["weights"] = arguments["weights"][..., :1].expand(-1, -1, -1, -1, -1, 3)
    grad = torch.randn(2, 2, 1, device=device).expand(-1, -1, 12)
    dense = cast(arguments, torch.float32) | dict(weights=arguments["weights"].contiguous())
    expected = with_gradients(dense, grad.contiguous(), backend=backend)
    strided = dict(
        arguments,
        points=arguments["points"].movedim(3, 0).contiguous().movedim(0, 3),
        visible=arguments["visible"].mT.contiguous().mT,
        feature_maps=[
            level.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 2))
            for level in arguments["feature_maps"]
        ],
    )
    actual = with_gradients(strided, grad, backend=backend)
    for name, a, e in zip(NAMES, actual, expected):
        torch.testing.assert_close(a, e, msg=name)
    assert actual[1].stride() == strided["feature_maps"][0].stride()  # a gradient has the layout of its map


def test_bitwise_repeatable(backend, device):
    """Many points on few cells: an order that depended on anything would show."""
    big = (
        dict(anchors=6, points=16, sizes=((2, 2),)) if backend == "torch" or device == "cuda" else dict(sizes=((2, 2),))
    )
    arguments = scene(torch.float32, device, **big)
    first = with_gradients(arguments, backend=backend)
    for _ in range(1 if device == "cpu" else 250):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(arguments, backend=backend), first))


@pytest.mark.parametrize(
    "sizes",
    [dict(batch=0), dict(anchors=0), dict(points=0), dict(cameras=0), dict(channels=0), dict(sizes=((0, 4),)),
     dict(sizes=((0, 4), (2, 2)))],
    ids=["batch", "anchors", "points", "cameras", "channels", "cells", "one level"],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "triton", "definition"])
def test_empty(backend, sizes, device):
    arguments = scene(torch.float32, device, **(dict(batch=1, anchors=1, points=2, groups=1, channels=4) | sizes))
    arguments["visible"].fill_(True)
    results = with_gradients(arguments, backend=backend)
    expected = with_gradients(cast(arguments, torch.float64), backend="definition")
    for result, value in zip(results, expected):
        assert result.shape == value.shape
        torch.testing.assert_close(result.double(), value, atol=1e-5, rtol=1e-5)


def test_shared_out_among_programs(device):
    """Few anchors with many points: several programs share one, and their sums are added in order."""
    arguments = scene(
        torch.float32, device, batch=1, anchors=1, points=130, cameras=1, channels=2, groups=1, sizes=((1, 2),)
    )
    assert configs.forward("interpreter", 4, 1, 130, 2, False)["SPLITS"] == 3
    arguments["points"][:] = -1  # but for some on either side of the seams
    arguments["points"][:, :, [0, 43, 44, 87, 88, 129]] = torch.tensor([0.4, 0.5], device=device)
    out = deformable_aggregation(**arguments, backend="triton")
    torch.testing.assert_close(out, deformable_aggregation(**arguments, backend="definition"))


def test_weights_of_another_dtype(backend, device):
    arguments = scene(torch.float16, device)
    arguments["weights"] = arguments["weights"].float()
    results = with_gradients(arguments, backend=backend)
    assert results[0].dtype == torch.float16 and results[4].dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(feature_maps=[]), ValueError, "feature_maps is empty"),
        (dict(points=torch.zeros(2, 2, 3, 2, 3)), ValueError, r"points has shape \(2, 2, 3, 2, 3\), needs"),
        (dict(points=torch.zeros(2, 2, 3, 2, 2).half()), TypeError, "points is float16, needs float32"),
        (dict(weights=torch.zeros(2, 2, 3, 2, 2, 5)), ValueError, "weights has 5 groups for C = 12, needs a divisor"),
        (dict(weights=torch.zeros(2, 2, 3, 2, 1, 3)), ValueError, "weights has shape .* needs .*levels"),
        (dict(visible=torch.ones(2, 2)), TypeError, "visible is float32, needs bool"),
        (dict(visible=torch.ones(2, 3, dtype=torch.bool)), ValueError, r"visible has shape \(2, 3\), needs"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        deformable_aggregation(**(scene(torch.float32, "cpu") | change))
    mixed = scene(torch.float32, "cpu")
    mixed["feature_maps"][1] = mixed["feature_maps"][1].double()
    with pytest.raises(TypeError, match=r"feature_maps\[1\] is float64, needs float32"):
        deformable_aggregation(**mixed)
