"""window_bias_attention: what is its own, beside the properties of every operation."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rigfuse.bench.memory import peak_on_cpu
from rigfuse.kernels import TokenMap, window_bias_attention
from rigfuse.kernels.window_bias_attention import definition
from rigfuse.kernels.window_bias_attention import torch as reference
from support.numerics import assert_as_exact_as_the_definition, assert_within_budget
from support.windows import MAPS, SMALL, cells_of, hostile_centers, tokens

NAN, INF = math.nan, math.inf
NAMES = ("out", "dquery", "dkey", "dvalue", "dweights", "dscale")


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


def check(inputs, grad, backend, maps=SMALL, *, max_bias=5.0, scale=None, more=()):
    settings = dict(maps=maps, max_bias=max_bias, scale=scale)
    call = lambda *t, backend: window_bias_attention(*t, **settings, backend=backend)  # noqa: E731

    def plain(query, key, value, *geometry):
        """In its own dtype and by the logarithm of the sum, rounded, as every flash attention keeps it."""
        flat = [number for token_map in maps for number in token_map]
        bias = definition.dense_bias(*geometry, flat, 0.5, 5.0, max_bias)[:, None].to(query.dtype)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * factor + bias
        return torch.einsum("bhij,bjhd->bihd", torch.exp(scores - scores.logsumexp(dim=-1, keepdim=True)), value)

    return assert_as_exact_as_the_definition(call, inputs, grad, backend, names=NAMES, plain=plain, more=more)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 50)
    monkeypatch.setattr(reference, "BLOCK", 500)  # scores: a few queries


@pytest.mark.parametrize("sizes", [(1, 70, 1, 16), (1, 19, 2, 40)], ids=["several query tiles", "split keys"])
def test_equals_the_definition(backend, dtype, sizes, device, guarded_allocations, small_chunks):
    inputs, grad = arguments(*sizes, MAPS, dtype=dtype, device=device)
    check(inputs, grad, backend, MAPS)


def test_plain_backend_off_the_cpu(dtype, monkeypatch, small_chunks):
    monkeypatch.setattr(reference, "_has_flash", lambda tensor: False)
    inputs, grad = arguments(2, 21, 2, 16, dtype=dtype)
    check(inputs, grad, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_suppressed_window_that_holds_all_the_mass(backend, dtype, device):
    """What is left outside the window is e^9 smaller than what the bias takes away: no digits may be lost."""
    maps = (TokenMap(9, 9, 3),)

    def draw():
        inputs, grad = arguments(1, 17, 1, 16, maps, dtype=dtype, device=device)
        with torch.no_grad():
            inputs[3][:] = 4
            inputs[4][:] = -3.0
            inputs[0][:] = 1
            inputs[1].mul_(0.1)[:, list(cells_of(maps[0], (4, 4)))] += 1.5
        return inputs, grad

    check(*draw(), backend, maps, max_bias=9.0, more=[draw() for _ in range(3)])


def test_large_logits(backend, device):
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float64, device=device, factor=30.0)
    check(inputs, grad, backend)
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float32, device=device, factor=300.0)
    out = window_bias_attention(*inputs, maps=SMALL, backend=backend)
    results = [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)]
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
    check(inputs, grad, backend, max_bias=1.0)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scale(backend, scale, device):
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float64, device=device)
    check(inputs, grad, backend, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_weight_it_is_plain_attention(any_backend, dtype, device):
    (query, key, value, centers, weights, bias_scale), _ = arguments(2, 23, 2, 32, dtype=dtype, device=device)
    heads_first = lambda tensors: [t.transpose(1, 2) for t in tensors]  # noqa: E731
    for off in ((centers, weights.detach() * 0), (torch.full_like(centers, NAN), weights)):
        out = window_bias_attention(query, key, value, *off, bias_scale, maps=SMALL, backend=any_backend)
        attend = lambda *qkv: scaled_dot_product_attention(*heads_first(qkv)).transpose(1, 2)  # noqa: E731
        exact = attend(query.double(), key.double(), value.double())
        assert_within_budget(out, exact, attend(query, key, value))


def test_weights_move_the_mass_on_and_off_the_window(any_backend, device):
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
            out = window_bias_attention(
                query, key, value, centers, weights_, bias_scale, maps=maps, backend=any_backend
            )
        return out[..., 0], out[..., 1], 1 - out[..., 0] - out[..., 1]

    neutral, on, off = mass(0.0, 0.0), mass(1.0, 0.0), mass(-1.0, 0.0)
    for now, factor in ((on, math.exp(2.5)), (off, math.exp(-2.5))):
        for other in (1, 2):  # the odds of the window against everything else change by exactly the bias
            torch.testing.assert_close(now[0] / now[other], factor * neutral[0] / neutral[other], rtol=1e-4, atol=0)
    assert (on[0] > 1.5 * neutral[0]).all() and (off[0] < neutral[0] / 4).all()
    both = mass(-1.0, 1.0)
    assert (both[0] < off[0]).all() and (both[1] > off[1]).all()


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


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(2, 5, 2, 129)), ValueError, "query has dim = 129, needs 16 to 128"),
        (dict(key=torch.zeros(2, 86, 2, 16)), ValueError, r"key has shape \(2, 86, 2, 16\), .* = \(2, 87, 2, 16\)"),
        (dict(maps=SMALL[:3]), ValueError, r"key has shape \(2, 87, 2, 16\), needs .* = \(2, 42, 2, 16\)"),
        (dict(maps=()), ValueError, r"maps is \(\), needs at least one TokenMap"),
        (dict(maps=5), ValueError, "maps is 5, needs at least one TokenMap"),
        (dict(maps=(5,)), ValueError, r"maps\[0\] is 5, needs TokenMap"),
        (dict(maps=(TokenMap(3, 4, 0),)), ValueError, r"maps\[0\] is \(3, 4, 0\), needs TokenMap"),
        (dict(maps=(TokenMap(3, 4.0, 1),)), ValueError, r"maps\[0\] is \(3, 4.0, 1\), needs TokenMap"),
        (dict(maps=((3, 4),)), ValueError, r"maps\[0\] is \(3, 4\), needs TokenMap"),
        (dict(value=torch.zeros(2, 87, 2, 16).double()), TypeError, "value is float64, needs float32"),
        (dict(centers=torch.zeros(2, 5, 4, 2).half()), TypeError, "centers is float16, needs float32"),
        (dict(weights=torch.zeros(2, 5, 4).double()), TypeError, "weights is float64, needs float32, float16"),
        (dict(bias_scale=torch.zeros(()).half()), TypeError, "bias_scale is float16, needs float32"),
        (dict(scale="1"), TypeError, "scale is a str, needs a finite number or None"),
        (dict(scale=NAN), ValueError, "scale is nan, needs a finite number"),
        (dict(scale=INF), ValueError, "scale is inf, needs a finite number"),
        (dict(max_bias=None), TypeError, "max_bias is a NoneType, needs a number"),
        (dict(max_bias=-1.0), ValueError, "max_bias is -1.0, needs at least 0"),
        (dict(max_bias=NAN), ValueError, "max_bias is nan, needs a number"),
        (dict(min_scale=6), ValueError, "min_scale is 6 and max_scale 5.0, needs min_scale ≤ max_scale"),
    ],
)
def test_bad_input(change, error, message):
    names = ("query", "key", "value", "centers", "weights", "bias_scale")
    valid = dict(zip(names, (t.detach() for t in arguments(2, 5, 2, 16)[0])), maps=SMALL)
    with pytest.raises(error, match=f"^window_bias_attention: {message}"):
        window_bias_attention(**{**valid, **change})
