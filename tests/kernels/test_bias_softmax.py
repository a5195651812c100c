"""bias_softmax: what is its own, beside the properties of every operation."""

import math

import pytest
import torch

from rigfuse.kernels import bias_softmax
from rigfuse.kernels.bias_softmax import configs
from support.numerics import assert_as_exact_as_the_definition

NAN, INF = math.nan, math.inf
LIMITS = dict(min_scale=0.5, max_scale=3.0, max_bias=2.0)


def tensors(shape, bias_shape, dtype=torch.float32, device="cpu", bias_scale=2.0):
    """scores, bias, bias_scale and a gradient of the result."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    made = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in (shape, bias_shape, shape)]
    inputs = [made[0], made[1], torch.tensor(bias_scale, dtype=geometry, device=device)]
    return [t.requires_grad_() for t in inputs], made[2]


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


def check(inputs, grad, backend, **limits):
    call = lambda *t, backend: bias_softmax(*t, **limits, backend=backend)  # noqa: E731
    out, *_ = assert_as_exact_as_the_definition(
        call, inputs, grad, backend, names=("out", "dscores", "dbias", "dscale"), rtol=1e-12
    )
    assert out.is_contiguous()


SHAPES = {
    "over heads": ((2, 3, 5, 37), (2, 1, 5, 37)),
    "over all rows": ((2, 3, 37), (37,)),
    "over keys": ((2, 3, 5, 37), (5, 1)),
    "outer and inner": ((3, 2, 2, 7), (3, 1, 2, 1)),
    "own": ((3, 131), (3, 131)),
    "one row": ((41,), (41,)),
    "one key": ((5, 1), (1,)),
    "many dimensions": ((2, 1, 3, 2, 2, 9), (1, 3, 1, 2, 9)),
    "a number": ((3, 4), ()),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["free", "clamped"])
def test_equals_the_definition(backend, case, limits, device, guarded_allocations):
    inputs, grad = tensors(*SHAPES[case], dtype=torch.float64, device=device)
    check(inputs, grad, backend, **limits)


def test_dtypes(backend, dtype, device):
    inputs, grad = tensors((2, 3, 5, 37), (2, 1, 5, 37), dtype=dtype, device=device)
    check(inputs, grad, backend, **LIMITS)


def test_rows_longer_than_a_tile(backend, monkeypatch, device, guarded_allocations):
    monkeypatch.setattr(configs, "_tile", lambda keys, largest: dict(BLOCK_K=16, num_warps=1))
    monkeypatch.setattr(configs, "chunk", lambda rows, sharing: 2)
    inputs, grad = tensors((2, 3, 5, 37), (2, 1, 1, 37), dtype=torch.float64, device=device)
    with torch.no_grad():  # the largest score in the first tile, in a middle one, in the last
        inputs[0][0, :, :, 3], inputs[0][1, 0, :, 20], inputs[0][1, 1, :, 36] = 800.0, 800.0, 800.0
    check(inputs, grad, backend, **LIMITS)


@pytest.mark.parametrize("bias_scale", [0.5, 0.25, 3.0, 3.5])
def test_clamps_pass_gradients_as_torch_clamp_does(backend, bias_scale, device):
    inputs, grad = tensors((4, 9), (4, 9), dtype=torch.float64, device=device, bias_scale=bias_scale)
    with torch.no_grad():
        inputs[1][:, :4] = torch.tensor([4.0, -4.0, 2.0, 8.0])
    check(inputs, grad, backend, **LIMITS)


@pytest.mark.parametrize("longer", [False, True], ids=["", "rows longer than a tile"])
def test_rows_of_minus_infinity(any_backend, longer, monkeypatch, device):
    """Zeros with zero gradients, whether scores or bias say so; elsewhere −inf is a key that does not count."""
    if longer:
        monkeypatch.setattr(configs, "_tile", lambda keys, largest: dict(BLOCK_K=4, num_warps=1))
    inputs, grad = tensors((2, 4, 9), (4, 9), dtype=torch.float64, device=device)
    with torch.no_grad():
        inputs[0][0, 0], inputs[1][1], inputs[0][1, 2, 3:], inputs[1][3, 0] = -INF, -INF, -INF, -INF
    results = with_gradients(lambda *t: bias_softmax(*t, backend=any_backend), inputs, grad)
    out, dscores, dbias, dscale = results
    assert all(result.isfinite().all() for result in results)
    for zero in (out[0, 0], out[:, 1], dscores[0, 0], dscores[:, 1], dbias[1], out[1, 2, 3:], out[:, 3, 0]):
        assert not zero.any()
    sums = out.sum(-1)
    sums[0, 0] = sums[:, 1] = 1
    torch.testing.assert_close(sums, torch.ones_like(sums))
    torch.testing.assert_close(out[1, 2, :3], (inputs[0][1, 2, :3] + inputs[2] * inputs[1][2, :3]).softmax(-1))
    assert dscale != 0


def test_large_and_hostile_scores(any_backend, device):
    inputs, grad = tensors((6, 9), (6, 9), device=device)
    with torch.no_grad():
        inputs[0][0] *= 1e4
        inputs[0][1, 2], inputs[0][2, 3], inputs[1][3, 1] = NAN, INF, NAN
    call = lambda *t: bias_softmax(*t, **LIMITS, backend=any_backend)  # noqa: E731
    logits = inputs[0] + (inputs[2] * inputs[1]).clamp(-2, 2)
    torch.testing.assert_close(call(*inputs), logits.softmax(-1), equal_nan=True)


def test_a_number_as_scale(any_backend, device):
    (scores, bias, bias_scale), _ = tensors((2, 3, 9), (3, 9), device=device)
    expected = bias_softmax(scores, bias, bias_scale, backend=any_backend)
    assert torch.equal(bias_softmax(scores, bias, 2, backend=any_backend), expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(scores=torch.zeros(())), ValueError, r"scores has shape \(\), needs \(..., keys\)"),
        (dict(bias=torch.zeros(2, 4)), ValueError, r"bias has shape \(2, 4\), needs .* scores, \(2, 3, 4\)"),
        (dict(bias=torch.zeros(1, 2, 3, 4)), ValueError, r"bias has shape \(1, 2, 3, 4\), needs"),
        (dict(bias_scale=torch.zeros(1)), ValueError, r"bias_scale has shape \(1,\), needs \(\)"),
        (dict(bias=torch.zeros(4).double()), TypeError, "bias is float64, needs float32, float16, bfloat16"),
        (dict(bias_scale=torch.zeros(()).half()), TypeError, "bias_scale is float16, needs float32"),
        (dict(bias_scale="2"), TypeError, "bias_scale is a str, needs a number or a tensor"),
        (dict(max_bias="1"), TypeError, "max_bias is a str, needs a number or None"),
        (dict(max_bias=NAN), ValueError, "max_bias is nan, needs a number or None"),
        (dict(max_bias=-1), ValueError, "max_bias is -1, needs at least 0"),
        (dict(min_scale=2, max_scale=1), ValueError, "min_scale is 2 and max_scale 1, needs min_scale ≤ max_scale"),
    ],
)
def test_bad_input(change, error, message):
    valid = dict(scores=torch.zeros(2, 3, 4), bias=torch.zeros(4))
    with pytest.raises(error, match=f"^bias_softmax: {message}"):
        bias_softmax(**{**valid, **change})
