import itertools

import pytest
import torch
from torch.library import opcheck

from rigfuse.kernels import BackendError, gated_fusion
from support.numerics import assert_within_budget

NAMES = ("original", "completed", "gate_logits", "fine", "importance")
MISSING = [True, False, True, False]


def explicit(original, completed, gate_logits, fine=None, importance=None, missing=None):
    """Independent formulation: the documents' sentence, image after image."""
    images = []
    for n, image in enumerate(original):
        if missing is not None and not missing[n]:
            images.append(image)
            continue
        proposal = completed[n]
        if fine is not None:
            proposal = proposal * (1 - importance[n]) + fine[n] * importance[n]
        gate = 1 / (1 + torch.exp(-gate_logits[n]))
        images.append(image * (1 - gate) + proposal * gate)
    return torch.stack(images)


def images(sizes, *, per_channel=False, branch=True, dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    """original, completed, gate_logits, fine, importance as leaves, and a gradient of the output."""
    n, channels, *size = sizes
    gates = channels if per_channel else 1
    make = lambda c, scale=1.0: torch.randn(n, c, *size, dtype=torch.float64) * scale  # noqa: E731
    made = [make(channels), make(channels), make(gates, 2.0)]
    made += [make(channels), torch.rand(n, 1, *size, dtype=torch.float64)] if branch else []
    made = [t.to(device, dtype).to(memory_format=layout).requires_grad_() for t in made]
    return made, make(channels).to(device, dtype)


def call(inputs, missing=None, backend=None, function=gated_fusion):
    fine, importance = inputs[3:] if len(inputs) > 3 else (None, None)
    keyword = {} if function is explicit else dict(backend=backend)
    return function(*inputs[:3], fine=fine, importance=importance, missing=missing, **keyword)


def with_gradients(inputs, grad, **options):
    out = call(inputs, **options)
    return (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True))


def assert_equal(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("missing", [None, MISSING, [False] * 4], ids=["all", "some", "none"])
@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["gate C", "gate 1"])
def test_equals_the_explicit_formulation(backend, dtype, per_channel, branch, missing, device, guarded_allocations):
    inputs, grad = images((4, 19, 5, 7), per_channel=per_channel, branch=branch, dtype=dtype, device=device)
    missing = None if missing is None else torch.tensor(missing, device=device)
    actual = with_gradients(inputs, grad, missing=missing, backend=backend)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(double, grad, missing=missing, function=explicit)
    plain = with_gradients(inputs, grad, missing=missing, function=explicit)
    assert actual[0].dtype == dtype
    for what, *results in zip(("out", *NAMES), actual, exact, plain):
        if dtype == torch.float64:
            torch.testing.assert_close(*results[:2], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(*results, what=what)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 5), (1, 150, 2, 3), (3, 20, 17, 19)])
def test_sizes_and_memory_formats(backend, sizes, layout, device, guarded_allocations):
    """More channels than a tile, more cells than a tile, one of everything; the result lies as the original does."""
    inputs, grad = images(sizes, dtype=torch.float64, device=device, layout=layout)
    actual = with_gradients(inputs, grad, backend=backend)
    assert actual[0].is_contiguous(memory_format=layout)
    for got, expected in zip(actual, with_gradients(inputs, grad, function=explicit)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["gate C", "gate 1"])
def test_present_images_return_bit_for_bit(backend, dtype, per_channel, branch, device):
    """Whatever the network proposes for an image that is there: NaN, ±inf, and −0 in the image itself."""
    inputs, grad = images((4, 6, 3, 5), per_channel=per_channel, branch=branch, dtype=dtype, device=device)
    missing = torch.tensor(MISSING, device=device)
    clean = with_gradients(inputs, grad, missing=missing, backend=backend)
    hostile = [t.detach().clone() for t in inputs]
    for tensor in hostile[1:]:
        tensor[1], tensor[3] = float("nan"), float("inf")
        tensor[3, :, 0] = -float("inf")
    hostile[0][1, 0] = -0.0
    hostile[0][3, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), torch.finfo(dtype).tiny])
    out, *grads = with_gradients([t.requires_grad_() for t in hostile], grad, missing=missing, backend=backend)
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


def test_gate_open_and_shut(backend, device):
    (original, completed, gate), _ = images((2, 3, 4, 5), branch=False, device=device)
    for logit, expected in ((-200.0, original), (200.0, completed)):
        out = gated_fusion(original, completed, torch.full_like(gate, logit), backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def layouts(tensor):
    """The same values in other memory: a slice, rows that do not follow, channels last, width before height."""
    yield torch.cat([tensor, tensor], dim=3)[..., : tensor.shape[3]]
    yield torch.cat([tensor, tensor], dim=1)[:, tensor.shape[1] :]
    yield tensor.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    yield tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("per_channel", [True, False], ids=["gate C", "gate 1"])
def test_strides(backend, per_channel, device):
    inputs, grad = images((3, 6, 4, 5), per_channel=per_channel, device=device)
    missing = torch.tensor([True, False, False, True, True, False], device=device)[::2]
    expected = with_gradients(inputs, grad, missing=missing, backend=backend)
    tensors = [t.detach() for t in (*inputs, grad)]
    mixed = [next(itertools.islice(layouts(t), i % 4, None)) for i, t in enumerate(tensors)]
    for *strided, strided_grad in (*zip(*map(layouts, tensors)), mixed):
        strided = [t.requires_grad_() for t in strided]
        got = with_gradients(strided, strided_grad, missing=missing, backend=backend)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_expanded(backend, device):
    """Stride 0: one proposal for every image, one gate for every cell, a gradient that is one number."""
    inputs, _ = images((1, 3, 1, 1), device=device)
    results = []
    for expand in (lambda t: t.expand(3, -1, 4, 5), lambda t: t.repeat(3, 1, 4, 5)):
        out = call([expand(t) for t in inputs], backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mixed", [torch.float16, torch.float64], ids=str)
def test_mixed_dtypes(backend, mixed, device):
    inputs, grad = images((2, 5, 3, 4), device=device)
    cast = [t if i % 2 else t.detach().to(mixed).requires_grad_() for i, t in enumerate(inputs)]
    out, *grads = with_gradients(cast, grad, backend=backend)
    assert out.dtype == mixed and [g.dtype for g in grads] == [t.dtype for t in cast]
    double = [t.detach().double().requires_grad_() for t in cast]
    for got, expected in zip((out, *grads), with_gradients(double, grad.to(mixed), function=explicit)):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
def test_empty(backend, sizes, branch, device):
    inputs, grad = images(sizes, branch=branch, device=device)
    missing = torch.ones(sizes[0], dtype=torch.bool, device=device)
    out, *grads = with_gradients(inputs, grad, missing=missing, backend=backend)
    assert out.shape == sizes and out.requires_grad
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs))


@pytest.mark.parametrize("per_channel, branch", [(True, True), (False, True), (False, False)])
def test_gradcheck(backend, per_channel, branch, device):
    inputs, _ = images((2, 3, 2, 2), per_channel=per_channel, branch=branch, dtype=torch.float64, device=device)
    missing = torch.tensor([True, False], device=device)
    assert torch.autograd.gradcheck(lambda *t: call(t, missing, backend), inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_each_gradient_alone(backend, wanted, device):
    inputs, grad = images((2, 5, 3, 4), device=device)
    missing = torch.tensor([True, False], device=device)
    expected = with_gradients(inputs, grad, missing=missing, backend=backend)[1 + wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
    (got,) = torch.autograd.grad(call(alone, missing, backend), [alone[wanted]], grad)
    assert_equal([got], [expected])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_opcheck(layout, device):
    from rigfuse.kernels.gated_fusion import ops

    inputs, grad = images((2, 5, 3, 4), device=device, layout=layout)
    inputs = [t.detach() for t in inputs]
    missing = torch.tensor([True, False], device=device)
    for arguments in ((*inputs, missing), (*inputs[:3], None, None, None)):
        opcheck(ops._forward_op, arguments)
        needs_grad = [True, False, True, arguments[3] is not None, arguments[4] is not None]
        opcheck(ops._backward_op, (grad, *arguments, needs_grad))


# Dynamo instantiates an autograd.Function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("branch", [True, False], ids=["fine", "coarse"])
def test_full_graph(backend, branch, device):
    torch._dynamo.reset()
    function = lambda missing, *inputs: call(inputs, missing, backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 5, 3, 4), (3, 6, 5, 7)):
        inputs, grad = images(sizes, branch=branch, device=device)
        missing = torch.rand(sizes[0], device=device) > 0.5
        expected = with_gradients(inputs, grad, missing=missing, backend=backend)
        out = compiled(missing, *inputs)
        for a, b in zip((out, *torch.autograd.grad(out, inputs, grad)), expected):
            torch.testing.assert_close(a, b)


def test_repeats_bit_for_bit(backend, device):
    inputs, grad = images((2, 40, 6, 7), dtype=torch.float16, device=device)
    first = with_gradients(inputs, grad, backend=backend)
    for _ in range(5 if device == "cpu" else 250):
        assert_equal(with_gradients(inputs, grad, backend=backend), first)


def test_bfloat16_on_the_plain_backend():
    inputs, grad = images((2, 9, 3, 4), dtype=torch.bfloat16)
    actual = with_gradients(inputs, grad, backend="torch")
    exact = with_gradients([t.detach().double().requires_grad_() for t in inputs], grad, function=explicit)
    plain = with_gradients(inputs, grad, function=explicit)
    for what, *results in zip(("out", *NAMES), actual, exact, plain):
        assert_within_budget(*results, what=what)


def valid_arguments():
    made, _ = images((2, 3, 4, 5))
    return dict(zip(NAMES, made), missing=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(original=1.0), TypeError, "original must be a tensor, got float"),
        (dict(original=torch.zeros(3, 4, 5)), ValueError, r"original has shape \(3, 4, 5\), needs \(N, C, H, W\)"),
        (dict(completed=torch.zeros(2, 3, 4, 6)), ValueError, r"completed has shape \(2, 3, 4, 6\)"),
        (dict(completed=None), TypeError, "completed must be a tensor, got NoneType"),
        (dict(gate_logits=torch.zeros(2, 2, 4, 5)), ValueError, r"gate_logits has shape \(2, 2, 4, 5\)"),
        (dict(gate_logits=torch.zeros(2, 4, 5)), ValueError, r"gate_logits has shape \(2, 4, 5\)"),
        (dict(gate_logits=0.5), TypeError, "gate_logits must be a tensor, got float"),
        (dict(fine=None), ValueError, "importance is given without fine"),
        (dict(importance=None), ValueError, "fine is given without importance"),
        (dict(fine=torch.zeros(1, 3, 4, 5)), ValueError, r"fine has shape \(1, 3, 4, 5\)"),
        (dict(importance=torch.zeros(2, 3, 4, 5)), ValueError, r"importance has shape \(2, 3, 4, 5\)"),
        (dict(missing=torch.ones(3, dtype=torch.bool)), ValueError, r"missing has shape \(3,\)"),
        (dict(missing=[True, False]), TypeError, "missing must be a tensor, got list"),
        (dict(original=torch.zeros(2, 3, 4, 5, dtype=torch.int32)), TypeError, "original is int32, needs float32"),
        (dict(fine=torch.zeros(2, 3, 4, 5, dtype=torch.bool)), TypeError, "fine is bool, needs float32"),
        (dict(missing=torch.ones(2)), TypeError, "missing is float32, needs bool"),
        (dict(completed=torch.zeros(2, 3, 4, 5, device="meta")), ValueError, "completed is on meta, needs cpu like"),
        (dict(backend="cuda"), BackendError, "backend is 'cuda'; choose one of"),
    ],
)
def test_bad_input(change, error, message):
    gated_fusion(**valid_arguments())
    with pytest.raises(error, match=f"^(gated_fusion: )?{message}"):
        gated_fusion(**{**valid_arguments(), **change})
