import math

import pytest
import torch
from torch.library import opcheck

from rigfuse.kernels import BackendError, bias_softmax
from rigfuse.kernels.bias_softmax import configs, ops
from support.numerics import assert_within_budget

NAN, INF = math.nan, math.inf
LIMITS = dict(min_scale=0.5, max_scale=3.0, max_bias=2.0)


def formula(scores, bias, bias_scale, min_scale=None, max_scale=None, max_bias=None):
    if min_scale is not None or max_scale is not None:
        bias_scale = bias_scale.clamp(min_scale, max_scale)
    scaled = bias_scale * bias
    if max_bias is not None:
        scaled = scaled.clamp(-max_bias, max_bias)
    return (scores + scaled.to(scores.dtype)).softmax(dim=-1)


def tensors(shape, bias_shape, dtype=torch.float32, device="cpu", bias_scale=2.0):
    """scores, bias, bias_scale and a gradient of the result."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    made = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in (shape, bias_shape, shape)]
    inputs = [made[0], made[1], torch.tensor(bias_scale, dtype=geometry, device=device)]
    return [t.requires_grad_() for t in inputs], made[2]


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


def check_against_formula(inputs, grad, backend, **limits):
    actual = with_gradients(lambda *t: bias_softmax(*t, **limits, backend=backend), inputs, grad)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(lambda *t: formula(*t, **limits), double, grad.double())
    plain = with_gradients(lambda *t: formula(*t, **limits), inputs, grad)
    for what, got, true, other in zip(("out", "dscores", "dbias", "dscale"), actual, exact, plain):
        assert got.dtype == other.dtype and got.is_contiguous()
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")  # noqa: B023
        elif what != "dscale":  # one number, on which a formulation may be exact by luck
            assert_within_budget(got, true, other, what=what)
        else:
            torch.testing.assert_close(got.double(), true, rtol=50 * torch.finfo(inputs[0].dtype).eps, atol=1e-5)


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
def test_equals_the_formula(backend, case, limits, device, guarded_allocations):
    inputs, grad = tensors(*SHAPES[case], dtype=torch.float64, device=device)
    check_against_formula(inputs, grad, backend, **limits)


def test_dtypes(backend, dtype, device):
    inputs, grad = tensors((2, 3, 5, 37), (2, 1, 5, 37), dtype=dtype, device=device)
    check_against_formula(inputs, grad, backend, **LIMITS)


def test_rows_longer_than_a_tile(backend, monkeypatch, device, guarded_allocations):
    monkeypatch.setattr(configs, "_tile", lambda keys, largest: dict(BLOCK_K=16, num_warps=1))
    monkeypatch.setattr(configs, "chunk", lambda rows, sharing: 2)
    inputs, grad = tensors((2, 3, 5, 37), (2, 1, 1, 37), dtype=torch.float64, device=device)
    check_against_formula(inputs, grad, backend, **LIMITS)


@pytest.mark.parametrize("bias_scale", [0.5, 0.25, 3.0, 3.5])
def test_clamps_pass_gradients_as_torch_clamp_does(backend, bias_scale, device):
    inputs, grad = tensors((4, 9), (4, 9), dtype=torch.float64, device=device, bias_scale=bias_scale)
    with torch.no_grad():
        inputs[1][:, :4] = torch.tensor([4.0, -4.0, 2.0, 8.0])
    check_against_formula(inputs, grad, backend, **LIMITS)


@pytest.mark.parametrize("longer", [False, True], ids=["", "rows longer than a tile"])
def test_rows_of_minus_infinity(backend, longer, monkeypatch, device):
    """Zeros with zero gradients, whether scores or bias say so; elsewhere −inf is a key that does not count."""
    if longer:
        monkeypatch.setattr(configs, "_tile", lambda keys, largest: dict(BLOCK_K=4, num_warps=1))
    inputs, grad = tensors((2, 4, 9), (4, 9), dtype=torch.float64, device=device)
    with torch.no_grad():
        inputs[0][0, 0], inputs[1][1], inputs[0][1, 2, 3:], inputs[1][3, 0] = -INF, -INF, -INF, -INF
    results = with_gradients(lambda *t: bias_softmax(*t, backend=backend), inputs, grad)
    out, dscores, dbias, dscale = results
    assert all(result.isfinite().all() for result in results)
    for zero in (out[0, 0], out[:, 1], dscores[0, 0], dscores[:, 1], dbias[1], out[1, 2, 3:], out[:, 3, 0]):
        assert not zero.any()
    sums = out.sum(-1)
    sums[0, 0] = sums[:, 1] = 1
    torch.testing.assert_close(sums, torch.ones_like(sums))
    torch.testing.assert_close(out[1, 2, :3], formula(inputs[0][1, 2, :3], inputs[1][2, :3], inputs[2]))
    assert dscale != 0


def test_large_and_hostile_scores(backend, device):
    inputs, grad = tensors((6, 9), (6, 9), device=device)
    with torch.no_grad():
        inputs[0][0] *= 1e4
        inputs[0][1, 2], inputs[0][2, 3], inputs[1][3, 1] = NAN, INF, NAN
    call = lambda *t: bias_softmax(*t, **LIMITS, backend=backend)  # noqa: E731
    torch.testing.assert_close(call(*inputs), formula(*inputs, **LIMITS), equal_nan=True)


def test_strides(backend, device):
    (scores, bias, bias_scale), grad = tensors((3, 5, 8), (5, 8), dtype=torch.float64, device=device)
    views = [scores.detach().mT.contiguous().mT, torch.stack([bias.detach()] * 2, -1)[..., 0], bias_scale.detach()]
    views = [t.requires_grad_() for t in views]
    copies = [t.detach().contiguous().clone().requires_grad_() for t in views]
    grad = grad[:1].expand(3, -1, -1)
    call = lambda *t: bias_softmax(*t, backend=backend)  # noqa: E731
    for got, expected in zip(with_gradients(call, views, grad), with_gradients(call, copies, grad.contiguous())):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_a_number_as_scale_and_each_gradient_alone(backend, device):
    inputs, grad = tensors((2, 3, 9), (3, 9), device=device)
    out, *together = with_gradients(lambda *t: bias_softmax(*t, backend=backend), inputs, grad)
    assert torch.equal(bias_softmax(inputs[0], inputs[1], 2, backend=backend), out)
    for leaf, expected in zip(inputs, together):
        alone = [t if t is leaf else t.detach() for t in inputs]
        (got,) = torch.autograd.grad(bias_softmax(*alone, backend=backend), leaf, grad)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape, bias_shape", [((0, 4), (4,)), ((3, 0), (3, 0)), ((2, 0, 4), (2, 1, 4))])
def test_nothing_to_do(backend, shape, bias_shape, device):
    inputs, grad = tensors(shape, bias_shape, device=device)
    results = with_gradients(lambda *t: bias_softmax(*t, backend=backend), inputs, grad)
    for result, like in zip(results, (inputs[0], *inputs)):
        assert result.shape == like.shape and not result.any()


def test_gradcheck(backend, device):
    inputs, _ = tensors((2, 2, 3), (2, 3), dtype=torch.float64, device=device)
    call = lambda *t: bias_softmax(*t, max_bias=10.0, backend=backend)  # noqa: E731
    torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_opcheck(backend, device):
    inputs, grad = tensors((2, 3, 5), (3, 5), device=device)
    settings = (0.5, 3.0, 2.0, backend)
    inputs = [t.detach() for t in inputs]
    opcheck(ops._forward_op, (*inputs, *settings))
    out = ops._forward_op(*inputs, *settings)
    opcheck(ops._backward_op, (grad, out, *inputs[1:], *settings, [True, False, True]))


# Dynamo instantiates an autograd.Function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_full_graph(backend, device):
    torch._dynamo.reset()
    call = lambda *t: bias_softmax(*t, **LIMITS, backend=backend) * 2  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 5), (4, 6, 7)):
        inputs, grad = tensors(shape, shape[1:], device=device)
        for got, expected in zip(with_gradients(compiled, inputs, grad), with_gradients(call, inputs, grad)):
            torch.testing.assert_close(got, expected)


def test_repeats_are_equal_bit_for_bit(backend, device):
    inputs, grad = tensors((4, 7, 33), (33,), device=device)
    call = lambda *t: bias_softmax(*t, backend=backend)  # noqa: E731
    for got, expected in zip(with_gradients(call, inputs, grad), with_gradients(call, inputs, grad)):
        assert torch.equal(got, expected)


def test_bfloat16_on_the_plain_backend():
    inputs, grad = tensors((2, 3, 5, 37), (2, 1, 5, 37), dtype=torch.bfloat16)
    check_against_formula(inputs, grad, "torch", **LIMITS)
    with pytest.raises(BackendError, match="cannot serve"):
        bias_softmax(*inputs, backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(scores=[1.0]), TypeError, "scores must be a tensor, got list"),
        (dict(bias=1.0), TypeError, "bias must be a tensor, got float"),
        (dict(scores=torch.zeros(())), ValueError, r"scores has shape \(\), needs \(..., keys\)"),
        (dict(bias=torch.zeros(2, 4)), ValueError, r"bias has shape \(2, 4\), needs .* scores, \(2, 3, 4\)"),
        (dict(bias=torch.zeros(1, 2, 3, 4)), ValueError, r"bias has shape \(1, 2, 3, 4\), needs"),
        (dict(bias_scale=torch.zeros(1)), ValueError, r"bias_scale has shape \(1,\), needs \(\)"),
        (dict(scores=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "scores is int64, needs float32"),
        (dict(bias=torch.zeros(4).double()), TypeError, "bias is float64, needs float32, float16, bfloat16"),
        (dict(bias_scale=torch.zeros(()).half()), TypeError, "bias_scale is float16, needs float32"),
        (dict(bias_scale="2"), TypeError, "bias_scale is a str, needs a number or a tensor"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "bias is on meta, needs cpu like scores"),
        (dict(max_bias="1"), TypeError, "max_bias is a str, needs a number or None"),
        (dict(max_bias=-1), ValueError, "max_bias is -1, needs at least 0"),
        (dict(min_scale=2, max_scale=1), ValueError, "min_scale is 2 and max_scale 1, needs min_scale ≤ max_scale"),
        (dict(backend="cuda"), BackendError, "backend is 'cuda'; choose one of"),
    ],
)
def test_bad_input(change, error, message):
    valid = dict(scores=torch.zeros(2, 3, 4), bias=torch.zeros(4))
    bias_softmax(**valid)
    with pytest.raises(error, match=f"^(bias_softmax: )?{message}"):
        bias_softmax(**{**valid, **change})
