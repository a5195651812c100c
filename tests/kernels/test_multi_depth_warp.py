"""multi_depth_warp and bev_warp: what is their own, beside the properties of every operation."""

import pytest
import torch
import torch.nn.functional as F

from rigfuse.kernels import bev_warp, multi_depth_warp
from rigfuse.kernels.multi_depth_warp.api import OPERATION
from support.numerics import assert_as_exact_as_the_definition

MODES = ["bilinear", "nearest"]
NAMES = ("features", "projection", "depths", "weights", "offsets", "source_index")


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


def check(arguments, grad, backend, **settings):
    """Against the definition, with gradients of features, weights and offsets."""
    arguments = dict(arguments)
    for name in ("features", "weights", "offsets"):
        arguments[name] = arguments[name].detach().requires_grad_()
    settings |= {name: arguments.pop(name) for name in list(arguments) if name not in NAMES}
    call = lambda *t, backend: multi_depth_warp(**dict(zip(arguments, t)), **settings, backend=backend)  # noqa: E731
    names = ("warped", "coverage", "dfeatures", "dweights", "doffsets")
    return assert_as_exact_as_the_definition(call, list(arguments.values()), grad, backend, names=names)


@pytest.mark.parametrize("mode, shared", [("bilinear", False), ("bilinear", True), ("nearest", False)])
def test_equals_the_definition(backend, dtype, mode, shared, device):
    arguments = scene(dtype, device)
    if shared:
        arguments["offsets"] = arguments["offsets"][:, :1]
    grad = torch.randn(3, 19, 5, 7, device=device).to(dtype)
    warped, coverage, _, _, doffsets = check(arguments, grad, backend, mode=mode)
    assert warped.dtype == dtype and coverage.dtype == torch.float32 and not coverage.requires_grad
    if mode == "nearest":
        assert not doffsets.any()


def test_results_lie_as_the_features_do(backend, device):
    arguments = scene(torch.float32, device)
    grad = torch.randn(3, 19, 5, 7, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments["features"] = arguments["features"].to(memory_format=memory_format)
        warped, _, dfeatures, *_ = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
        assert warped.is_contiguous(memory_format=memory_format)
    assert dfeatures.is_contiguous(memory_format=torch.channels_last)


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


def each_its_own(arguments):
    """The same call with a projection and a source index for each hypothesis."""
    depths = arguments["depths"].shape[1]
    projection = arguments["projection"][:, None].expand(-1, depths, -1, -1)
    return arguments | dict(projection=projection, source_index=arguments["source_index"][:, None].expand(-1, depths))


@pytest.mark.parametrize("mode", MODES)
def test_hypotheses_that_are_alike_give_the_same_bits(backend, mode, device):
    arguments = scene(torch.float32, device, targets=2, channels=5)
    grad = torch.randn(2, 5, 5, 7, device=device)
    expected = with_gradients(multi_depth_warp, arguments, grad, mode=mode, backend=backend)
    own = each_its_own(arguments)
    for changed in (own, arguments | dict(source_index=own["source_index"])):
        actual = with_gradients(multi_depth_warp, changed, grad, mode=mode, backend=backend)
        assert bitwise_equal(actual, expected)


def test_hypotheses_of_one_target_add_up(any_backend, device):
    """What each contributes is the warp with it alone; one without a map counts nothing, whatever its weight."""
    arguments = scene(torch.float64, device, targets=2, channels=3, depths=3)
    projection = torch.stack([arguments["projection"].roll(shift, 0) for shift in (0, 1, 0)], 1)
    index = torch.tensor([[2, 0, -1], [-1, 1, 2]], device=device)
    arguments |= dict(projection=projection, source_index=index)
    arguments["weights"][0, 2] = arguments["weights"][1, 0] = float("nan")
    grad = torch.randn(2, 3, 5, 7, dtype=torch.float64, device=device)
    together = with_gradients(multi_depth_warp, arguments, grad, backend=any_backend)
    alone = []
    for d in range(3):
        of_d = {name: arguments[name][:, d : d + 1] for name in ("depths", "weights", "offsets")}
        of_d |= dict(projection=projection[:, d], source_index=index[:, d].clamp(min=0))
        of_d["weights"] = of_d["weights"].where(index[:, d, None, None, None] >= 0, 0)
        found = list(with_gradients(multi_depth_warp, arguments | of_d, grad, backend=any_backend))
        found[3] = found[3].where(index[:, d, None, None, None] >= 0, 0)
        alone.append(found)
    warped, coverage, dfeatures, dweights, doffsets = zip(*alone)
    sums = (sum(warped), sum(coverage), sum(dfeatures), torch.cat(dweights, 1), torch.cat(doffsets, 1))
    for one, other in zip(together, sums):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_borders(any_backend, mode, device):
    """A row of locations across the left and the right border of a map of two columns."""
    features = torch.tensor([[[[1.0, 2.0]]]], device=device)
    at = [-1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0]
    offsets = torch.zeros(1, 1, 1, len(at), 2, device=device)
    offsets[..., 0] = torch.tensor(at, device=device)
    projection = torch.zeros(1, 3, 4, device=device)
    projection[:, 2, 2] = 1
    warped, coverage = multi_depth_warp(
        features, projection, torch.ones(1, device=device),
        offsets=offsets, output_size=(1, len(at)), mode=mode, backend=any_backend,
    )  # fmt: skip
    if mode == "bilinear":
        values = [0, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 1.5, 1, 0.5, 0]
        covered = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    else:
        values = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
        covered = [float(value > 0) for value in values]
    assert warped.flatten().tolist() == values and coverage.flatten().tolist() == covered


def test_min_depth_is_exclusive_and_tested_before_the_division(any_backend, device):
    features = torch.ones(5, 1, 1, 1, device=device)
    projection = torch.zeros(5, 3, 4, device=device)
    projection[:, 2, 3] = torch.tensor([0.5, 0.500001, 0.0, -1.0, float("nan")])
    depths = torch.ones(1, device=device)
    _, coverage = multi_depth_warp(features, projection, depths, min_depth=0.5, backend=any_backend)
    assert coverage.flatten().tolist() == [0, 1, 0, 0, 0]


def test_min_depth_keeps_its_digits_in_float64(any_backend, device):
    """Between 0.1 and the float32 next to it."""
    features = torch.ones(2, 1, 1, 1, dtype=torch.float64, device=device)
    projection = torch.zeros(2, 3, 4, dtype=torch.float64, device=device)
    projection[:, 2, 3] = torch.tensor([0.1, 0.1 + 1e-12], dtype=torch.float64)
    depths = torch.ones(1, dtype=torch.float64, device=device)
    _, coverage = multi_depth_warp(features, projection, depths, min_depth=0.1, backend=any_backend)
    assert coverage.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("scale", [0.06, 7.0])
def test_strong_magnification_and_minification(backend, scale, device):
    """Many target tiles on one source cell, and target cells far apart in the source."""
    features = torch.randn(1, 3, 9, 17, dtype=torch.float64, device=device, requires_grad=True)
    transform = torch.tensor([[[scale, 0, 0.3], [0, scale, 0.4]]], dtype=torch.float64, device=device)
    call = lambda f, t, backend: bev_warp(f, t, output_size=(12, 20), backend=backend)  # noqa: E731
    grad = torch.randn(1, 3, 12, 20, dtype=torch.float64, device=device)
    assert_as_exact_as_the_definition(call, [features, transform], grad, backend)


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (11, 1)])
def test_thin_maps(backend, size, device):
    arguments = scene(torch.float64, device, targets=2, channels=2, source=size, size=size)
    check(arguments, torch.randn(2, 2, *size, device=device, dtype=torch.float64), backend)


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


def test_weights_of_another_dtype(backend, device):
    arguments = scene(torch.float16, device, targets=2)
    arguments["weights"] = arguments["weights"].float()
    grad = torch.randn(2, 19, 5, 7, device=device)
    warped, _, dfeatures, dweights, _ = with_gradients(multi_depth_warp, arguments, grad, backend=backend)
    assert (warped.dtype, dfeatures.dtype, dweights.dtype) == (torch.float16, torch.float16, torch.float32)


def test_index_outside_gives_zeros(any_backend, device):
    """What a GPU does, where the index cannot be checked beforehand."""
    features = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
    index = torch.tensor([-1, 1, 2, 2**31 - 1], device=device)
    identity = torch.eye(3, 4, device=device).repeat(4, 1, 1)
    for source_index in (index, index[:, None]):
        tensors = (features, identity, torch.ones(1, device=device), None, None, source_index)
        warped, coverage = OPERATION(any_backend, tensors, 4, 4, False, 0.1)
        (gradient,) = torch.autograd.grad(warped.sum(), features)
        for sums, expected in (
            (warped.sum((1, 2, 3)), [0, 48, 0, 0]),
            (coverage.sum((1, 2)), [0, 16, 0, 0]),
            (gradient.sum((1, 2, 3)), [0, 48]),
        ):
            torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float32, device=device))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(depths=torch.ones(3, 0)), ValueError, "depths has D = 0, needs at least 1"),
        (dict(depths=torch.full((3, 2), -1.0)), ValueError, "depths has values from -1.0, needs positive"),
        (dict(depths=torch.full((3, 2), float("nan"))), ValueError, "depths has values from nan, needs positive"),
        (dict(weights=torch.ones(3, 1, 5, 7)), ValueError, r"weights has shape \(3, 1, 5, 7\)"),
        (dict(offsets=torch.ones(3, 4, 5, 7, 2)), ValueError, r"offsets has shape \(3, 4, 5, 7, 2\), needs .* or "),
        (dict(projection=torch.ones(3, 3, 4).half()), TypeError, "projection is float16, needs float32"),
        (dict(depths=torch.ones(2).double()), TypeError, "depths is float64, needs float32"),
        (dict(source_index=torch.zeros(3).short()), TypeError, "source_index is int16, needs int32, int64"),
        (dict(source_index=torch.tensor([2, 3, 2])), ValueError, "source_index has values from 2 to 3, needs 0 to 2"),
        (dict(source_index=None, projection=torch.ones(2, 3, 4), depths=torch.ones(2), weights=None, offsets=None),
         ValueError, "source_index is None with 3 sources and 2 targets"),
        (dict(source_index=torch.tensor([[0, -2]] * 3)), ValueError, "source_index has values from -2 to 0, needs -1"),
        (dict(source_index=torch.zeros(3, 3, dtype=torch.int64)), ValueError,
         r"source_index has shape \(3, 3\), needs \(N\) = \(3\) or \(N, D\) = \(3, 2\)"),
        (dict(projection=torch.ones(3, 1, 3, 4)), ValueError, r"depths has shape \(3, 2\), needs"),
        (dict(output_size=5), ValueError, r"output_size is 5, needs \(height, width\)"),
        (dict(output_size=(5, -1)), ValueError, r"output_size is \(5, -1\), needs two integers of at least 0"),
        (dict(output_size=(5, 1.5)), ValueError, "output_size is"),
        (dict(output_size=(10**9, 10**9)), ValueError, "output_size is .*, needs at most 2147483647 cells"),
        (dict(mode="cubic"), ValueError, "mode is 'cubic', needs one of bilinear, nearest"),
        (dict(min_depth=-1.0), ValueError, "min_depth is -1.0, needs a depth of at least 0"),
        (dict(min_depth=float("nan")), ValueError, "min_depth is nan, needs a depth of at least 0"),
        (dict(min_depth="1"), TypeError, "min_depth is a str, needs a depth of at least 0"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^multi_depth_warp: {message}"):
        multi_depth_warp(**{**scene(torch.float32, "cpu"), **change})
    if change.keys() <= {"output_size", "mode"}:
        with pytest.raises(error, match=f"^bev_warp: {message}"):
            bev_warp(torch.ones(1, 1, 5, 7), torch.ones(1, 2, 3), **change)
