import math

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from rigfuse.bench.memory import peak_on_cpu
from rigfuse.kernels import BackendError, TokenMap, window_bias_attention
from rigfuse.kernels.window_bias_attention import ops
from rigfuse.kernels.window_bias_attention import torch as reference
from support.numerics import assert_within_budget

NAN, INF = math.nan, math.inf
# A map of several tiles, even and odd windows, one larger than its map, a single cell, prime sizes.
MAPS = (TokenMap(26, 17, 5), TokenMap(5, 7, 4), TokenMap(3, 2, 8), TokenMap(1, 1, 1), TokenMap(13, 11, 3))
SMALL = (TokenMap(5, 7, 4), TokenMap(3, 2, 8), TokenMap(1, 1, 1), TokenMap(9, 5, 3))
NAMES = ("out", "dquery", "dkey", "dvalue", "dweights and dscale")


def tokens(maps):
    return sum(height * width for height, width, _ in maps)


def cells_of(token_map, center):
    """The cells of a window that lie on the map, by walking it."""
    height, width, window = token_map
    if not all(math.isfinite(c) for c in center):
        return []
    left, top = (math.floor(c + 0.5) - window // 2 for c in center)
    columns, rows = range(max(0, left), min(width, left + window)), range(max(0, top), min(height, top + window))
    return [row * width + column for row in rows for column in columns]


def dense(query, key, value, centers, weights, bias_scale, maps, limits=(0.5, 5.0, 5.0), scale=None):
    """Independent formulation: the whole bias, window by window, then the softmax spelled out."""
    (batch, length, _, dim), (low, high, limit) = query.shape, limits
    strength = torch.clamp(bias_scale.clamp(low, high) * weights, -limit, limit)
    bias, start = torch.zeros(batch, length, tokens(maps), dtype=strength.dtype, device=query.device), 0
    for m, token_map in enumerate(maps):
        window = torch.zeros_like(bias)
        for b in range(batch):
            for i, center in enumerate(centers[b, :, m].tolist()):
                window[b, i, [start + cell for cell in cells_of(token_map, center)]] = 1
        bias = bias + window * strength[:, :, m, None]
        start += token_map.height * token_map.width
    scale = dim**-0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale + bias[:, None].to(query.dtype)
    # By the logarithm of the sum, rounded, as every flash attention keeps it: the budget is that of its rounding.
    probabilities = torch.exp(scores - scores.logsumexp(dim=-1, keepdim=True))
    return torch.einsum("bhij,bjhd->bihd", probabilities, value)


def hostile_centers(batch, length, maps):
    """On the map and round it, half cells, and what is nowhere; most queries gather in a few rows of the first map."""
    sizes = torch.tensor([[width, height] for height, width, _ in maps])
    centers = torch.rand(batch, length, len(maps), 2) * (sizes + 8) - 4
    centers[:, :, 0, 1] = 12 + 2 * torch.rand(batch, length)
    centers[:, ::3] = centers[:, ::3].floor() + 0.5
    odd = [(NAN, NAN), (NAN, 1.0), (1.0, NAN), (INF, 2.0), (2.0, -INF), (3e38, 0.0), (-1e10, 2.0), (0.0, 2.0**31)]
    odd += [(-0.5, -0.5), (-6.0, 0.0), (0.0, 1e9), (20.0, 30.0), (0.0, 0.0)]
    for position, center in enumerate(odd[:length]):
        centers[:, position] = torch.tensor(center)
    return centers


def arguments(batch, length, heads, dim, maps=SMALL, dtype=torch.float32, device="cpu", factor=1.0):
    """query, key, value, centers, weights, bias_scale and a gradient of the output."""
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (length, tokens(maps), tokens(maps), length)
    query, key, value, grad = (torch.randn(batch, size, heads, dim, dtype=torch.float64) for size in sizes)
    centers = hostile_centers(batch, length, maps)
    weights = torch.randn(batch, length, len(maps))
    weights[:, 1::7] = 0
    tensors = [(query * factor).to(dtype), key.to(dtype), value.to(dtype), centers.to(geometry), weights.to(geometry)]
    tensors = [t.to(device) for t in (*tensors, torch.tensor(2.5, dtype=geometry))]
    return [t if t is tensors[3] else t.requires_grad_() for t in tensors], grad.to(device, dtype)


def leaves(inputs):
    return [t for position, t in enumerate(inputs) if position != 3]


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, leaves(inputs), grad.to(out.dtype)))


def _with_joint_bias_gradients(results):
    """The scale's gradient is one number, on which a formulation may be exact by luck: judged with the weights'."""
    return *results[:4], torch.cat([gradient.flatten() for gradient in results[4:]])


def check_against_dense(inputs, grad, backend, maps=SMALL, limits=(0.5, 5.0, 5.0), scale=None):
    keywords = dict(zip(("min_scale", "max_scale", "max_bias"), limits), maps=maps, scale=scale, backend=backend)
    actual = with_gradients(lambda *tensors: window_bias_attention(*tensors, **keywords), inputs, grad)
    double = [t.detach().double() for t in inputs]
    double = [t if t is double[3] else t.requires_grad_() for t in double]
    call = lambda *tensors: dense(*tensors, maps, limits, scale)  # noqa: E731
    exact = with_gradients(call, double, grad.double())
    plain = with_gradients(call, inputs, grad)
    assert actual[0].dtype == inputs[0].dtype and actual[0].is_contiguous()
    assert [result.dtype for result in actual] == [result.dtype for result in plain]
    for what, *results in zip(NAMES, *map(_with_joint_bias_gradients, (actual, exact, plain))):
        if inputs[0].dtype == torch.float64:
            torch.testing.assert_close(*results[:2], rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")  # noqa: B023
        else:
            assert_within_budget(*results, what=what)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 50)
    monkeypatch.setattr(reference, "BLOCK", 500)  # scores: a few queries


@pytest.mark.parametrize("sizes", [(2, 70, 1, 16), (1, 19, 2, 40)], ids=["several query tiles", "split keys"])
def test_equals_the_dense_bias(backend, dtype, sizes, device, guarded_allocations, small_chunks):
    inputs, grad = arguments(*sizes, MAPS, dtype=dtype, device=device)
    check_against_dense(inputs, grad, backend, MAPS)


def test_plain_backend_off_the_cpu(dtype, monkeypatch, small_chunks):
    monkeypatch.setattr(reference, "_has_flash", lambda tensor: False)
    inputs, grad = arguments(2, 21, 2, 16, dtype=dtype)
    check_against_dense(inputs, grad, "torch")


def test_bfloat16_on_the_plain_backend(small_chunks):
    inputs, grad = arguments(2, 21, 2, 32, dtype=torch.bfloat16)
    check_against_dense(inputs, grad, "torch")
    with pytest.raises(BackendError, match="cannot serve"):
        window_bias_attention(*inputs, maps=SMALL, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_suppressed_window_that_holds_all_the_mass(backend, dtype, device):
    """What is left outside the window is e^9 smaller than what the bias takes away: no digits may be lost."""
    maps = (TokenMap(9, 9, 3),)
    inputs, grad = arguments(1, 17, 1, 16, maps, dtype=dtype, device=device)
    with torch.no_grad():
        inputs[3][:] = 4
        inputs[4][:] = -3.0
        inputs[0][:] = 1
        inputs[1].mul_(0.1)[:, [cell for cell in cells_of(maps[0], (4, 4))]] += 1.5
    check_against_dense(inputs, grad, backend, maps, limits=(0.5, 5.0, 9.0))


def test_large_logits(backend, device):
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float64, device=device, factor=30.0)
    check_against_dense(inputs, grad, backend)
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float32, device=device, factor=300.0)
    results = with_gradients(lambda *t: window_bias_attention(*t, maps=SMALL, backend=backend), inputs, grad)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("bias_scale", [0.5, 0.4375, 2.0, 5.0, 5.5], ids="scale {}".format)
def test_clamps_pass_gradients_as_torch_clamp_does(backend, bias_scale, device):
    """At and over the limits of the scale, and of the bias: powers of two, so that the limits are met exactly."""
    inputs, grad = arguments(1, 29, 1, 16, dtype=torch.float64, device=device)
    with torch.no_grad():
        inputs[5].fill_(bias_scale)
        inputs[4][:, 15:20] = 0.5
        inputs[4][:, 20:25] = -0.5
        inputs[4][:, 25:] = 2.0
    check_against_dense(inputs, grad, backend, limits=(0.5, 5.0, 1.0))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scale(backend, scale, device):
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float64, device=device)
    check_against_dense(inputs, grad, backend, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_weight_it_is_plain_attention(backend, dtype, device):
    (query, key, value, centers, weights, bias_scale), _ = arguments(2, 23, 2, 32, dtype=dtype, device=device)
    heads_first = lambda tensors: [t.transpose(1, 2) for t in tensors]  # noqa: E731
    for off in ((centers, weights.detach() * 0), (torch.full_like(centers, NAN), weights)):
        out = window_bias_attention(query, key, value, *off, bias_scale, maps=SMALL, backend=backend)
        attend = lambda *qkv: scaled_dot_product_attention(*heads_first(qkv)).transpose(1, 2)  # noqa: E731
        exact = attend(query.double(), key.double(), value.double())
        assert_within_budget(out, exact, attend(query, key, value))


def test_weights_move_the_mass_on_and_off_the_window(backend, device):
    """With values that mark a map's window, the output is the attention mass inside it."""
    maps = (TokenMap(12, 10, 5), TokenMap(6, 6, 4))
    (query, key, value, centers, weights, bias_scale), _ = arguments(1, 9, 2, 16, maps, device=device)
    with torch.no_grad():
        centers[:] = torch.tensor([[5.0, 6.0], [2.0, 3.0]], device=device)
        value.zero_()
        value[:, cells_of(maps[0], (5.0, 6.0)), :, 0] = 1
        value[:, [120 + cell for cell in cells_of(maps[1], (2.0, 3.0))], :, 1] = 1

    def mass(first, second):
        weights_ = torch.tensor([first, second], device=device).expand(1, 9, 2)
        with torch.no_grad():
            out = window_bias_attention(query, key, value, centers, weights_, bias_scale, maps=maps, backend=backend)
        return out[..., 0], out[..., 1], 1 - out[..., 0] - out[..., 1]

    neutral, on, off = mass(0.0, 0.0), mass(1.0, 0.0), mass(-1.0, 0.0)
    for now, factor in ((on, math.exp(2.5)), (off, math.exp(-2.5))):
        for other in (1, 2):  # the odds of the window against everything else change by exactly the bias
            torch.testing.assert_close(now[0] / now[other], factor * neutral[0] / neutral[other], rtol=1e-4, atol=0)
    assert (on[0] > 1.5 * neutral[0]).all() and (off[0] < neutral[0] / 4).all()
    both = mass(-1.0, 1.0)
    assert (both[0] < off[0]).all() and (both[1] > off[1]).all()


def test_strides(backend, device):
    """Heads before length, every second token, an expanded query, and a last dimension that is not dense."""
    (query, key, value, centers, weights, bias_scale), grad = arguments(2, 7, 2, 16, dtype=torch.float64, device=device)
    query = query.detach()[:1].expand(2, -1, -1, -1)
    key = key.detach().transpose(1, 2).contiguous().transpose(1, 2)
    value = torch.stack([value.detach(), value.detach()], dim=-1)[..., 0]
    centers = torch.stack([centers, -centers], dim=2)[:, :, 0]
    weights = weights.detach().transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.cat([grad, grad], dim=1)[:, ::2]
    views = [query, key, value, centers, weights, bias_scale.detach()]
    call = lambda *tensors: window_bias_attention(*tensors, maps=SMALL, backend=backend)  # noqa: E731
    for t in leaves(views):
        t.requires_grad_()
    copies = [t.detach().contiguous().clone() for t in views]
    for t in leaves(copies):
        t.requires_grad_()
    for got, expected in zip(with_gradients(call, views, grad), with_gradients(call, copies, grad.contiguous())):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_each_gradient_alone(backend, device):
    inputs, grad = arguments(1, 15, 1, 16, device=device)
    call = lambda *tensors: window_bias_attention(*tensors, maps=SMALL, backend=backend)  # noqa: E731
    _, *together = with_gradients(call, inputs, grad)
    for leaf, expected in zip(leaves(inputs), together):
        alone = [t if t is leaf else t.detach() for t in inputs]
        (got,) = torch.autograd.grad(call(*alone), leaf, grad)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_gradcheck(backend, device):
    maps = (TokenMap(3, 4, 2), TokenMap(2, 3, 3))
    (query, key, value, centers, weights, bias_scale), _ = arguments(1, 3, 1, 16, maps, torch.float64, device)
    centers = torch.rand(1, 3, 2, 2, dtype=torch.float64, device=device) * 3
    call = lambda *t: window_bias_attention(*t[:3], centers, *t[3:], maps=maps, backend=backend)  # noqa: E731
    torch.autograd.gradcheck(call, (query, key, value, weights, bias_scale), fast_mode=True)


def test_opcheck(backend, device):
    inputs, grad = arguments(1, 3, 1, 16, SMALL[:2], device=device)
    inputs = [t.detach() for t in inputs]
    settings = ([number for token_map in SMALL[:2] for number in token_map], 0.5, 5.0, 5.0, 0.25, backend)
    opcheck(ops._forward_op, (*inputs, *settings))
    out, lse = ops._forward_op(*inputs, *settings)
    opcheck(ops._backward_op, (grad, out, lse, *inputs, *settings, [True, False, True, True, False]))


# Dynamo instantiates an autograd.Function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_full_graph(backend, device):
    torch._dynamo.reset()
    call = lambda *tensors: window_bias_attention(*tensors, maps=SMALL, backend=backend) * 2  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 10):
        inputs, grad = arguments(1, length, 2, 16, device=device)
        for got, expected in zip(with_gradients(compiled, inputs, grad), with_gradients(call, inputs, grad)):
            torch.testing.assert_close(got, expected)


def test_repeats_are_equal_bit_for_bit(backend, device):
    inputs, grad = arguments(1, 67, 1, 16, device=device)
    call = lambda *tensors: window_bias_attention(*tensors, maps=SMALL, backend=backend)  # noqa: E731
    first = with_gradients(call, inputs, grad)
    for got, expected in zip(with_gradients(call, inputs, grad), first):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_nothing_to_do(backend, batch, length, device):
    inputs, grad = arguments(batch, length, 2, 16, device=device)
    results = with_gradients(lambda *t: window_bias_attention(*t, maps=SMALL, backend=backend), inputs, grad)
    for result, like in zip(results, (inputs[0], *leaves(inputs))):
        assert result.shape == like.shape and not result.any()


def test_autocast(backend, device):
    (query, key, value, centers, weights, bias_scale), _ = arguments(1, 9, 2, 16, device=device)
    more = dict(maps=SMALL, backend=backend)
    call = lambda q, k, v, w: window_bias_attention(q, k, v, centers, w, bias_scale, **more)  # noqa: E731
    with torch.autocast(device, dtype=torch.float16):
        out = call(query, key.half(), value, weights.half())
        grads = torch.autograd.grad(out.sum(), (query, key, value, weights, bias_scale))
    assert out.dtype == torch.float16 and [g.dtype for g in grads] == [torch.float32] * 5
    expected = call(query.half(), key.half(), value.half(), weights.half())
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for got, like in zip(grads, torch.autograd.grad(expected.sum(), (query, key, value, weights, bias_scale))):
        torch.testing.assert_close(got, like, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_plain_backend(dtype):
    """At the size of system C: at most a tenth of the scores in half precision above inputs and results."""
    maps = (TokenMap(128, 128, 5), *[TokenMap(20, 50, 8)] * 6)
    sizes = torch.tensor([[width, height] for height, width, _ in maps])
    query, key, value, grad = (torch.randn(1, n, 8, 32).to(dtype) for n in (900, 22_384, 22_384, 900))
    weights, bias_scale = torch.randn(1, 900, 7), torch.tensor(2.5)
    inputs = [t.requires_grad_() for t in (query, key, value, weights, bias_scale)]
    centers = torch.rand(1, 900, 7, 2) * sizes

    def step():
        out = window_bias_attention(query, key, value, centers, weights, bias_scale, maps=maps, backend="torch")
        return out, torch.autograd.grad(out, inputs, grad)

    results = sum(t.numel() * t.element_size() for t in (query, *inputs))
    assert peak_on_cpu(lambda: None, step) - results < 0.1 * 8 * 900 * 22_384 * 2


def valid_arguments():
    query, key, value, centers, weights, bias_scale = (t.detach() for t in arguments(2, 5, 2, 16)[0])
    tensors = dict(query=query, key=key, value=value, centers=centers, weights=weights, bias_scale=bias_scale)
    return dict(tensors, maps=SMALL)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
        (dict(query=torch.zeros(2, 5, 32)), ValueError, r"query has shape \(2, 5, 32\), needs \(B, Lq, heads, dim\)"),
        (dict(query=torch.zeros(2, 5, 2, 8)), ValueError, "query has dim 8, needs 16 to 128"),
        (dict(query=torch.zeros(2, 5, 2, 129)), ValueError, "query has dim 129, needs 16 to 128"),
        (dict(key=torch.zeros(2, 86, 2, 16)), ValueError, r"key has shape \(2, 86, 2, 16\), .* = \(2, 87, 2, 16\)"),
        (dict(value=torch.zeros(2, 86, 2, 16)), ValueError, r"value has shape \(2, 86, 2, 16\), needs"),
        (dict(maps=SMALL[:3]), ValueError, r"key has shape \(2, 87, 2, 16\), needs .* = \(2, 42, 2, 16\)"),
        (dict(maps=()), ValueError, "maps is empty, needs at least one TokenMap"),
        (dict(maps=(TokenMap(3, 4, 0),)), ValueError, r"maps\[0\] is \(3, 4, 0\), needs TokenMap"),
        (dict(maps=(TokenMap(3, 4.0, 1),)), ValueError, r"maps\[0\] is \(3, 4.0, 1\), needs TokenMap"),
        (dict(maps=((3, 4),)), ValueError, r"maps\[0\] is \(3, 4\), needs TokenMap"),
        (dict(centers=torch.zeros(2, 5, 3, 2)), ValueError, r"centers has shape \(2, 5, 3, 2\), .* = \(2, 5, 4, 2\)"),
        (dict(weights=torch.zeros(2, 5)), ValueError, r"weights has shape \(2, 5\), needs \(B, Lq, maps\)"),
        (dict(bias_scale=torch.zeros(1)), ValueError, r"bias_scale has shape \(1,\), needs \(\)"),
        (dict(bias_scale=2.5), TypeError, "bias_scale must be a tensor, got float"),
        (dict(query=torch.zeros(2, 5, 2, 16, dtype=torch.int32)), TypeError, "query is int32, needs float32"),
        (dict(key=torch.zeros(2, 87, 2, 16).half()), TypeError, "key is float16, needs float32"),
        (dict(value=torch.zeros(2, 87, 2, 16).double()), TypeError, "value is float64, needs float32"),
        (dict(centers=torch.zeros(2, 5, 4, 2).half()), TypeError, "centers is float16, needs float32"),
        (dict(weights=torch.zeros(2, 5, 4).double()), TypeError, "weights is float64, needs float32, float16"),
        (dict(bias_scale=torch.zeros(()).half()), TypeError, "bias_scale is float16, needs float32"),
        (dict(centers=torch.zeros(2, 5, 4, 2, requires_grad=True)), ValueError, "centers requires grad"),
        (dict(weights=torch.zeros(2, 5, 4, device="meta")), ValueError, "weights is on meta, needs cpu like query"),
        (dict(scale="1"), TypeError, "scale is a str, needs a number"),
        (dict(max_bias=None), TypeError, "max_bias is a NoneType, needs a number"),
        (dict(max_bias=-1.0), ValueError, "max_bias is -1.0, needs at least 0"),
        (dict(max_bias=NAN), ValueError, "max_bias is nan, needs at least 0"),
        (dict(min_scale=6), ValueError, "min_scale is 6 and max_scale 5.0, needs min_scale ≤ max_scale"),
        (dict(backend="cuda"), BackendError, "backend is 'cuda'; choose one of"),
    ],
)
def test_bad_input(change, error, message):
    window_bias_attention(**valid_arguments())
    with pytest.raises(error, match=f"^(window_bias_attention: )?{message}"):
        window_bias_attention(**{**valid_arguments(), **change})
