"""multi_depth_warp and bev_warp against grid_sample in float64, one plane at a time."""

import pytest
import torch
import torch.nn.functional as F

from rigfuse.kernels import bev_warp, multi_depth_warp
from rigfuse.kernels.multi_depth_warp import ops
from rigfuse.kernels.multi_depth_warp import torch as reference
from support.numerics import assert_within_budget

MODES = ["bilinear", "nearest"]


def plane_by_plane(features, projection, depths, weights, offsets, source_index, size, mode, min_depth=0.1):
    """The definition, with every plane stored. Computes in the dtype of its inputs."""
    source_h, source_w = features.shape[2:]
    warped, coverage = [], []
    for n, p in enumerate(projection):
        image = features[source_index[n] : source_index[n] + 1]
        image = torch.cat([image, torch.ones_like(image[:, :1])], 1)
        blended = 0
        for d in range(depths.shape[-1]):
            depth = depths.expand(len(projection), -1)[n, d]
            v, u = torch.meshgrid(*(torch.arange(s, device=p.device).to(p.dtype) for s in size), indexing="ij")
            point = torch.stack([u * depth, v * depth, depth.expand(size), torch.ones_like(u)], -1) @ p.T
            location = point[..., :2] / point[..., 2:]
            if offsets is not None:
                location = location + offsets[n, d if offsets.shape[1] > 1 else 0]
            usable = (point[..., 2] > min_depth) & (location.abs() < 1e6).all(-1)
            location = torch.where(usable[..., None], location, -1e3)
            grid = (2 * location + 1) / location.new_tensor([source_w, source_h]) - 1
            plane = F.grid_sample(image, grid[None], mode=mode, padding_mode="zeros", align_corners=False)
            weight = weights[n, d] if weights is not None else torch.full(size, 1 / depths.shape[-1]).to(plane)
            # Not a product: what lies outside counts nothing, whatever its weight.
            blended = blended + torch.where(plane[:, -1:] > 0, weight * plane, 0)
        warped.append(blended[:, :-1])
        coverage.append(blended[:, -1])
    return torch.cat(warped), torch.cat(coverage)


def scene(dtype, device, *, sources=3, targets=3, channels=19, source=(7, 13), size=(5, 7), depths=2):
    """Random features and weights, cameras that moved, offsets that reach over the border, the last one half behind."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    projection = torch.eye(3, 4, dtype=geometry).repeat(targets, 1, 1)
    projection += 0.02 * torch.randn(targets, 3, 4, dtype=geometry)
    projection[:, 2] = torch.tensor([0.003, -0.002, 1, 0.5])
    projection[-1:, 2] = torch.tensor([0.2, 0, -0.5, 0.5])
    arguments = dict(
        features=torch.randn(sources, channels, *source).to(dtype),
        projection=projection,
        depths=torch.rand(targets, depths, dtype=geometry) * 20 + 10,
        weights=torch.randn(targets, depths, *size).to(dtype),
        offsets=2 * torch.randn(targets, depths, *size, 2, dtype=geometry),
        source_index=torch.tensor([1, 1, 0])[:targets],
    )
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    return arguments | dict(output_size=size)


def with_gradients(function, arguments, grad, **settings):
    """Warped features, coverage, and the gradients of features, weights and offsets."""
    arguments = dict(arguments)
    leaves = []
    for name in ("features", "weights", "offsets"):
        arguments[name] = arguments[name].detach().requires_grad_()
        leaves.append(arguments[name])
    warped, coverage = function(**arguments, **settings)
    return warped, coverage, *torch.autograd.grad(warped, leaves, grad.to(warped.dtype))


def bitwise_equal(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("mode, shared", [("bilinear", False), ("bilinear", True), ("nearest", False)])
def test_against_float64(backend, dtype, mode, shared, device):
    arguments = scene(dtype, device)
    if shared:
        arguments["offsets"] = arguments["offsets"][:, :1]
    grad = torch.randn(3, 19, 5, 7, device=device).to(dtype)
    actual = with_gradients(multi_depth_warp, arguments, grad, mode=mode, backend=backend)

    def formula(output_size, **tensors):
        return plane_by_plane(**tensors, size=output_size, mode=mode)

    def cast(to):
        floats = {k: t.to(to) for k, t in arguments.items() if k not in ("source_index", "output_size")}
        return arguments | floats

    exact = with_gradients(formula, cast(torch.float64), grad)
    plain = with_gradients(formula, cast(torch.float32), grad)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32 and not actual[1].requires_grad
    for name, a, e, p in zip(["warped", "coverage", "dfeatures", "dweights", "doffsets"], actual, exact, plain):
        assert e.isfinite().all()
        if dtype == torch.float64:
            torch.testing.assert_close(a, e.to(a.dtype))
        else:
            assert_within_budget(a, e, p.to(a.dtype), what=name)
    if mode == "nearest":
        assert not actual[4].any()


@pytest.mark.parametrize("mode", MODES)
def test_identity_and_whole_pixel_shift(backend, mode, device):
    features = torch.randn(2, 5, 7, 11, device=device)
    depths = torch.tensor([10.0, 30.0], device=device)
    warped, coverage = multi_depth_warp(
        features, torch.eye(3, 4, device=device).repeat(2, 1, 1), depths, mode=mode, backend=backend
    )
    assert torch.equal(warped, features) and (coverage == 1).all()

    transform = torch.tensor([[1.0, 0, 3], [0, 1, -2]], device=device).repeat(2, 1, 1)
    warped, coverage = bev_warp(features, transform, mode=mode, backend=backend)
    assert torch.equal(warped[:, :, 2:, :-3], features[:, :, :-2, 3:])
    assert not warped[:, :, :2].any() and not warped[:, :, :, -3:].any()
    assert (coverage[:, 2:, :-3] == 1).all() and coverage.sum() == 2 * 5 * 8


def test_bev_warp_is_one_plane(backend, device):
    features = torch.randn(2, 5, 7, 11, device=device)
    transform = torch.eye(2, 3, device=device) + 0.1 * torch.randn(3, 2, 3, device=device)
    index = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    projection = F.pad(transform, (0, 1, 0, 1))
    projection[:, 2, 2] = 1
    settings = dict(source_index=index, output_size=(6, 5), backend=backend)
    expected = multi_depth_warp(features, projection, torch.ones(1, device=device), **settings)
    assert bitwise_equal(bev_warp(features, transform, **settings), expected)


@pytest.mark.parametrize("mode", MODES)
def test_borders(backend, mode, device):
    """A row of locations across the left and the right border of a map of two columns."""
    features = torch.tensor([[[[1.0, 2.0]]]], device=device)
    at = [-1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0]
    offsets = torch.zeros(1, 1, 1, len(at), 2, device=device)
    offsets[..., 0] = torch.tensor(at, device=device)
    projection = torch.zeros(1, 3, 4, device=device)
    projection[:, 2, 2] = 1
    warped, coverage = multi_depth_warp(
        features, projection, torch.ones(1, device=device),
        offsets=offsets, output_size=(1, len(at)), mode=mode, backend=backend,
    )  # fmt: skip
    if mode == "bilinear":
        values = [0, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 1.5, 1, 0.5, 0]
        covered = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    else:
        values = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
        covered = [float(value > 0) for value in values]
    assert warped.flatten().tolist() == values and coverage.flatten().tolist() == covered


def test_min_depth_is_exclusive_and_tested_before_the_division(backend, device):
    features = torch.ones(5, 1, 1, 1, device=device)
    projection = torch.zeros(5, 3, 4, device=device)
    projection[:, 2, 3] = torch.tensor([0.5, 0.500001, 0.0, -1.0, float("nan")])
    _, coverage = multi_depth_warp(features, projection, torch.ones(1, device=device), min_depth=0.5, backend=backend)
    assert coverage.flatten().tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_hostile_values_read_nothing(backend, mode, device, guarded_allocations):
    bad = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, -(2.0**31)]
    arguments = scene(torch.float32, device, targets=3, depths=1)
    arguments["offsets"][0, 0, 0, : len(bad), 0] = torch.tensor(bad)
    arguments["offsets"][0, 0, 1, : len(bad), 1] = torch.tensor(bad)
    arguments["projection"][1, 0, 0] = float("nan")
    arguments["projection"][2, 1, 3] = 1e30
    arguments["weights"][0, 0, :2, : len(bad)] = float("nan")
    arguments["weights"][1:] = float("inf")
    grad = torch.randn(3, 19, 5, 7, device=device)
    results = with_gradients(multi_depth_warp, arguments, grad, mode=mode, backend=backend)
    warped, coverage, _, dweights, doffsets = results
    assert all(result.isfinite().all() for result in results)
    for image in (warped.permute(0, 2, 3, 1), coverage[..., None], dweights[:, 0, ..., None], doffsets[:, 0]):
        assert not image[0, :2, : len(bad)].any() and not image[1:].any()
    assert coverage[0].any()


def test_gradient_that_is_not_finite_reaches_its_cells_and_no_other(backend, device):
    arguments = scene(torch.float32, device, targets=1, depths=1)
    clean = torch.randn(1, 19, 5, 7, device=device)
    dirty, touched = clean.clone(), torch.zeros_like(clean)
    for channel, row, column, value in [(3, 2, 4, float("nan")), (5, 1, 1, float("inf"))]:
        dirty[0, channel, row, column], touched[0, channel, row, column] = value, 1
    result, expected, touches = (
        with_gradients(multi_depth_warp, arguments, grad, backend=backend)[2:] for grad in (dirty, clean, touched)
    )
    for name, r, e, touch in zip(["features", "weights", "offsets"], result, expected, touches):
        assert touch.any(), name
        assert torch.equal(~r.isfinite(), touch != 0), name
        torch.testing.assert_close(r[touch == 0], e[touch == 0])


def test_layouts(backend, device):
    """Strided, expanded and permuted inputs and gradients give what dense ones give."""
    arguments = scene(torch.float32, device)
    arguments["features"] = arguments["features"][:1].expand(3, -1, -1, -1)
    arguments["depths"] = arguments["depths"][:1].expand(3, -1)
    arguments["weights"] = arguments["weights"][..., :1].expand(-1, -1, -1, 7)
    grad = torch.randn(3, 19, 5, 1, device=device).expand(-1, -1, -1, 7)
    dense = {k: t.contiguous() if isinstance(t, torch.Tensor) else t for k, t in arguments.items()}
    expected = with_gradients(multi_depth_warp, dense, grad.contiguous(), backend=backend)
    assert expected[0].is_contiguous()

    strided = dict(arguments, depths=arguments["depths"][0])
    strided["projection"] = arguments["projection"].mT.contiguous().mT
    strided["offsets"] = arguments["offsets"].movedim(-1, 0).contiguous().movedim(0, -1)
    assert bitwise_equal(with_gradients(multi_depth_warp, strided, grad, backend=backend), expected)

    wide = torch.randn(3, 7, 26, 22, device=device)
    wide[:, :, ::2, :19] = dense["features"].permute(0, 2, 3, 1)
    sliced = dict(strided, features=wide[:, :, ::2, :19].permute(0, 3, 1, 2))
    results = with_gradients(
        multi_depth_warp, sliced, grad.contiguous(memory_format=torch.channels_last), backend=backend
    )
    for result, value in zip(results, expected):
        torch.testing.assert_close(result, value)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [0.06, 7.0])
def test_strong_magnification_and_minification(backend, scale, device):
    """Many target tiles on one source cell, and target cells far apart in the source."""
    features = torch.randn(1, 3, 9, 17, dtype=torch.float64, device=device, requires_grad=True)
    transform = torch.tensor([[[scale, 0, 0.3], [0, scale, 0.4]]], dtype=torch.float64, device=device)
    warped, _ = bev_warp(features, transform, output_size=(12, 20), backend=backend)
    grad = torch.randn_like(warped)
    actual = torch.autograd.grad(warped, features, grad)[0]
    projection = F.pad(transform, (0, 1, 0, 1))
    projection[:, 2, 2] = 1
    ones = torch.ones(1, dtype=torch.float64, device=device)
    expected, _ = plane_by_plane(features, projection, ones, None, None, [0], (12, 20), "bilinear")
    torch.testing.assert_close(warped, expected)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, features, grad)[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (11, 1)])
def test_thin_maps(backend, size, device):
    arguments = scene(torch.float64, device, targets=2, channels=2, source=size, size=size)
    grad = torch.randn(2, 2, *size, device=device, dtype=torch.float64)
    actual = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    tensors = {name: tensor for name, tensor in arguments.items() if name != "output_size"}
    expected = with_gradients(plane_by_plane, tensors, grad, size=size, mode="bilinear")
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e.to(a.dtype))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode, device):
    arguments = scene(torch.float64, device, targets=2, channels=2, source=(3, 4), size=(3, 3))
    leaves = [arguments.pop(name).requires_grad_() for name in ("features", "weights", "offsets")]

    def warp(features, weights, offsets):
        return multi_depth_warp(features, weights=weights, offsets=offsets, **arguments, mode=mode, backend=backend)[0]

    assert torch.autograd.gradcheck(warp, leaves, fast_mode=True)


def test_only_what_asks_gets_a_gradient(backend, device):
    arguments = scene(torch.float32, device, targets=1)
    grad = torch.randn(1, 19, 5, 7, device=device)
    expected = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    for position, name in enumerate(["features", "weights", "offsets"]):
        leaf = arguments[name].clone().requires_grad_()
        warped, _ = multi_depth_warp(**(arguments | {name: leaf}), backend=backend)
        assert torch.equal(torch.autograd.grad(warped, leaf, grad)[0], expected[2 + position])


def test_bitwise_repeatable(backend, device):
    arguments = scene(torch.float32, device)
    grad = torch.randn(3, 19, 5, 7, device=device)
    first = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    for _ in range(1 if device == "cpu" else 250):
        assert bitwise_equal(with_gradients(multi_depth_warp, arguments, grad, backend=backend), first)


def test_writes_everything_and_nothing_else(device, guarded_allocations):
    arguments = scene(torch.float32, device)
    results = with_gradients(multi_depth_warp, arguments, torch.ones(3, 19, 5, 7, device=device), backend="triton")
    assert all(result.isfinite().all() for result in results)
    assert not results[2][2].any()  # nobody reads map 2


@pytest.mark.parametrize("implementation", [ops.multi_depth_warp, reference.multi_depth_warp], ids=["triton", "torch"])
def test_index_outside_gives_zeros(implementation, device):
    """What a GPU does, where the index cannot be checked beforehand."""
    features = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
    index = torch.tensor([-1, 1, 2, 2**31 - 1], device=device)
    identity = torch.eye(3, 4, device=device).repeat(4, 1, 1)
    depths = torch.ones(1, device=device)
    warped, coverage = implementation(features, identity, depths, None, None, index, 4, 4, False, 0.1)
    warped.sum().backward()
    assert warped.sum((1, 2, 3)).tolist() == [0, 48, 0, 0] and coverage.sum((1, 2)).tolist() == [0, 16, 0, 0]
    assert features.grad.sum((1, 2, 3)).tolist() == [0, 48]


@pytest.mark.parametrize(
    "sources, targets, channels, source, size",
    [(0, 0, 3, (4, 5), (4, 5)), (2, 0, 3, (4, 5), (2, 3)), (2, 2, 0, (4, 5), (4, 5)), (2, 2, 3, (0, 5), (2, 3)),
     (2, 2, 3, (4, 5), (0, 3)), (2, 2, 3, (4, 5), (2, 0))],
)  # fmt: skip
def test_empty(backend, sources, targets, channels, source, size, device):
    sizes = dict(sources=sources, targets=targets, channels=channels, source=source, size=size)
    arguments = scene(torch.float32, device, **sizes)
    if sources == 0:
        arguments["source_index"] = None
    results = with_gradients(
        multi_depth_warp, arguments, torch.ones(targets, channels, *size, device=device), backend=backend
    )
    warped, coverage, *gradients = results
    assert warped.shape == (targets, channels, *size) and coverage.shape == (targets, *size)
    assert not warped.any()
    for name, gradient in zip(["features", "weights", "offsets"], gradients):
        assert gradient.shape == arguments[name].shape and not gradient.any()


def test_autocast_leaves_the_computation_alone(backend, device):
    arguments = scene(torch.float32, device, targets=1)
    grad = torch.randn(1, 19, 5, 7, device=device)
    expected = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert bitwise_equal(with_gradients(multi_depth_warp, arguments, grad, backend=backend), expected)


def test_weights_of_another_dtype(backend, device):
    arguments = scene(torch.float16, device, targets=2)
    arguments["weights"] = arguments["weights"].float()
    grad = torch.randn(2, 19, 5, 7, device=device)
    warped, _, dfeatures, dweights, _ = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    assert (warped.dtype, dfeatures.dtype, dweights.dtype) == (torch.float16, torch.float16, torch.float32)


# Dynamo instantiates an autograd.Function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile(backend, device):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def warp(**arguments):
        warped, coverage = multi_depth_warp(**arguments, backend=backend)
        return warped * 2, coverage

    for size in [(5, 7), (4, 3)]:
        arguments = scene(torch.float32, device, targets=2, size=size)
        arguments["features"] = arguments["features"].to(memory_format=torch.channels_last)
        grad = torch.randn(2, 19, *size, device=device)
        warped, *others = with_gradients(multi_depth_warp, arguments, 2 * grad, backend=backend)
        results = with_gradients(warp, arguments, grad)
        assert results[0].stride() == warped.stride()
        assert bitwise_equal(results, (2 * warped, *others))


def test_opcheck(device):
    arguments = scene(torch.float32, device, targets=1, channels=3, size=(4, 5))
    tensors = [arguments[name] for name in ("features", "projection", "depths", "weights", "offsets", "source_index")]
    features = tensors[0].to(memory_format=torch.channels_last)
    settings = (features, *tensors[1:], *arguments["output_size"], False, 0.1)
    torch.library.opcheck(torch.ops.rigfuse.multi_depth_warp.default, settings)
    grad = torch.randn(1, 3, 4, 5, device=device)
    backward = torch.ops.rigfuse.multi_depth_warp_backward.default
    torch.library.opcheck(backward, (grad, *settings, [True, False, True]))


def _bad(name, message, error=ValueError):
    return pytest.param(name, error, message, id=f"{name[0]}-{message.split()[0]}")


@pytest.mark.parametrize(
    "change, error, message",
    [
        _bad(("features", lambda t: t[0]), "features has shape"),
        _bad(("features", lambda t: t.int()), "features is int32", TypeError),
        _bad(("features", lambda t: t.tolist()), "features must be a tensor", TypeError),
        _bad(("projection", lambda t: t[:, :2]), r"projection has shape \(3, 2, 4\), needs \(N, 3, 4\)"),
        _bad(("projection", lambda t: t.half()), "projection is float16, needs float32", TypeError),
        _bad(("projection", lambda t: t.requires_grad_()), "projection requires grad"),
        _bad(("projection", lambda t: t.to("meta")), "projection is on meta"),
        _bad(("depths", lambda t: t[:2]), "depths has shape"),
        _bad(("depths", lambda t: t[:, :0]), "depths has shape .* needs at least one depth"),
        _bad(("depths", lambda t: t.double()), "depths is float64", TypeError),
        _bad(("depths", lambda t: -t), "depths has values from -.* needs positive"),
        _bad(("depths", lambda t: t * float("nan")), "depths has values from nan, needs positive"),
        _bad(("depths", lambda t: t.requires_grad_()), "depths requires grad"),
        _bad(("weights", lambda t: t[:, :1]), "weights has shape"),
        _bad(("weights", lambda t: t.long()), "weights is int64", TypeError),
        _bad(("offsets", lambda t: t[..., 0]), "offsets has shape"),
        _bad(("offsets", lambda t: torch.cat([t, t], 1)), "offsets has shape"),
        _bad(("offsets", lambda t: t.bfloat16()), "offsets is bfloat16", TypeError),
        _bad(("source_index", lambda t: t[:2]), "source_index has shape"),
        _bad(("source_index", lambda t: t.short()), "source_index is int16", TypeError),
        _bad(("source_index", lambda t: t + 2), "source_index has values from 2 to 3, needs 0 to 2"),
        _bad(("output_size", lambda size: 5), "output_size is 5"),
        _bad(("output_size", lambda size: (5, -1)), "output_size is"),
        _bad(("output_size", lambda size: (5, 1.5)), "output_size is"),
        _bad(("mode", lambda mode: "cubic"), "mode is 'cubic', needs one of bilinear, nearest"),
        _bad(("min_depth", lambda depth: -1.0), "min_depth is -1.0"),
        _bad(("min_depth", lambda depth: float("nan")), "min_depth is nan"),
        _bad(("backend", lambda backend: "cuda"), "backend is 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    name, replace = change
    arguments = scene(torch.float32, "cpu") | dict(mode="bilinear", min_depth=0.1, backend="torch")
    arguments[name] = replace(arguments[name])
    with pytest.raises(error, match=f"{name}.*" if name == "backend" else message):
        multi_depth_warp(**arguments)


@pytest.mark.parametrize(
    "transform, message",
    [(torch.zeros(3, 2, 3), "source_index is None with 2 sources and 3 targets"),
     (torch.zeros(2, 3, 3), "transform has shape"),
     (torch.zeros(2, 2, 3).requires_grad_(), "transform requires grad")],
)  # fmt: skip
def test_bad_transform(transform, message):
    with pytest.raises(ValueError, match=f"bev_warp: {message}"):
        bev_warp(torch.zeros(2, 3, 4, 5), transform)
