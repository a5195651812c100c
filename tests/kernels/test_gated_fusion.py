"""gated_fusion: what is its own, beside the properties of every operation."""

import itertools

import pytest
import torch

from rigfuse.kernels import gated_fusion
from support.numerics import assert_as_exact_as_the_definition

MISSING = [True, False, True, False]


def images(sizes, *, per_channel=False, branch=True, dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    """original, completed, gate_logits, fine, importance as leaves, and a gradient of the output."""
    n, channels, *size = sizes
    gates = channels if per_channel else 1
    make = lambda c, scale=1.0: torch.randn(n, c, *size, dtype=torch.float64) * scale  # noqa: E731
    made = [make(channels), make(channels), make(gates, 2.0)]
    made += [make(channels), torch.rand(n, 1, *size, dtype=torch.float64)] if branch else []
    made = [t.to(device, dtype).to(memory_format=layout).requires_grad_() for t in made]
    return made, make(channels).to(device, dtype)


def fuse(missing=None):
    """The operation of three or five tensors."""

    def call(original, completed, gate_logits, fine=None, importance=None, *, backend):
        return gated_fusion(
            original, completed, gate_logits, fine=fine, importance=importance, missing=missing, backend=backend
        )

    return call


def with_gradients(inputs, grad, missing=None, *, backend):
    out = fuse(missing)(*inputs, backend=backend)
    return (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True))


def assert_equal(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("missing", [None, MISSING, [False] * 4], ids=["all", "some", "none"])
@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["gate C", "gate 1"])
def test_equals_the_definition(backend, dtype, per_channel, branch, missing, device, guarded_allocations):
    inputs, grad = images((4, 19, 5, 7), per_channel=per_channel, branch=branch, dtype=dtype, device=device)
    missing = None if missing is None else torch.tensor(missing, device=device)
    assert_as_exact_as_the_definition(fuse(missing), inputs, grad, backend, rtol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 5), (1, 150, 2, 3), (3, 20, 17, 19)])
def test_sizes_and_memory_formats(backend, sizes, layout, device, guarded_allocations):
    """More channels than a tile, more cells than a tile, one of everything; the result lies as the original does."""
    inputs, grad = images(sizes, dtype=torch.float64, device=device, layout=layout)
    out, *_ = assert_as_exact_as_the_definition(fuse(), inputs, grad, backend, rtol=1e-12)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["gate C", "gate 1"])
def test_present_images_return_bit_for_bit(any_backend, dtype, per_channel, branch, device):
    """Whatever the network proposes for an image that is there: NaN, ±inf, and −0 in the image itself."""
    if any_backend == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter is silently wrong in bfloat16")
    inputs, grad = images((4, 6, 3, 5), per_channel=per_channel, branch=branch, dtype=dtype, device=device)
    missing = torch.tensor(MISSING, device=device)
    clean = with_gradients(inputs, grad, missing=missing, backend=any_backend)
    hostile = [t.detach().clone() for t in inputs]
    for tensor in hostile[1:]:
        tensor[1], tensor[3] = float("nan"), float("inf")
        tensor[3, :, 0] = -float("inf")
    hostile[0][1, 0] = -0.0
    hostile[0][3, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), torch.finfo(dtype).tiny])
    out, *grads = with_gradients([t.requires_grad_() for t in hostile], grad, missing=missing, backend=any_backend)
    assert_equal([out[~missing]], [hostile[0][~missing]])
    assert torch.equal(out[~missing].signbit(), hostile[0][~missing].signbit())
    assert torch.equal(grads[0][~missing], grad[~missing])
    assert all(not g[~missing].any() for g in grads[1:])
    assert_equal([t[missing] for t in (out, *grads)], [t[missing] for t in clean])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_hostile_values_stay_in_their_cell(backend, device):
    inputs, grad = images((2, 3, 4, 5), device=device)
    clean = with_gradients(inputs, grad, backend=backend)
    for index, bad in itertools.product(range(5), (float("nan"), float("inf"), -float("inf"))):
        hostile = [t.detach().clone() for t in inputs]
        hostile[index][1, :, 2, 3] = bad
        dirty = with_gradients([t.requires_grad_() for t in hostile], grad, backend=backend)
        elsewhere = torch.ones(2, 4, 5, dtype=torch.bool, device=device)
        elsewhere[1, 2, 3] = False
        for after, before in zip(dirty, clean):
            keep = elsewhere[:, None].expand_as(after)
            assert_equal([after[keep]], [before[keep]])
        if index != 2:  # an infinite gate is open or shut
            assert not dirty[0][1, :, 2, 3].isfinite().any()


def test_gate_open_and_shut(any_backend, device):
    (original, completed, gate), _ = images((2, 3, 4, 5), branch=False, device=device)
    for logit, expected in ((-200.0, original), (200.0, completed)):
        out = gated_fusion(original, completed, torch.full_like(gate, logit), backend=any_backend)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixed", [torch.float16, torch.float64], ids=str)
def test_mixed_dtypes(backend, mixed, device):
    inputs, grad = images((2, 5, 3, 4), device=device)
    cast = [t if i % 2 else t.detach().to(mixed).requires_grad_() for i, t in enumerate(inputs)]
    out, *grads = with_gradients(cast, grad, backend=backend)
    assert out.dtype == mixed and [g.dtype for g in grads] == [t.dtype for t in cast]
    double = [t.detach().double().requires_grad_() for t in cast]
    for got, expected in zip((out, *grads), with_gradients(double, grad.to(mixed), backend="definition")):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)


def test_the_fine_branch_needs_both():
    (original, completed, gate, fine, importance), _ = images((2, 3, 4, 5))
    with pytest.raises(ValueError, match="^gated_fusion: importance is given without fine"):
        gated_fusion(original, completed, gate, importance=importance)
    with pytest.raises(ValueError, match="^gated_fusion: fine is given without importance"):
        gated_fusion(original, completed, gate, fine=fine)
    with pytest.raises(ValueError, match=r"gate_logits has shape \(2, 2, 4, 5\), needs .* or .* = \(2, 1, 4, 5\)"):
        gated_fusion(original, completed, completed[:, :2])
