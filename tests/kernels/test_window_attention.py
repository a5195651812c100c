"""window_attention: what is its own, beside the properties of every operation."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rigfuse.bench.memory import peak_on_cpu
from rigfuse.kernels import TokenMap, window_attention, window_bias_attention
from support.numerics import assert_as_exact_as_the_definition
from support.windows import MAPS, SMALL, cells_of, hostile_centers, tokens

NAN = math.nan


def arguments(batch, length, heads, dim, maps=SMALL, dtype=torch.float32, device="cpu"):
    """query, key, value, centers and a gradient of the output."""
    sizes = (length, tokens(maps), tokens(maps), length)
    tensors = [torch.randn(batch, size, heads, dim, dtype=torch.float64).to(device, dtype) for size in sizes]
    centers = hostile_centers(batch, length, maps).to(device, torch.promote_types(dtype, torch.float32))
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), centers], tensors[3]


def with_gradients(inputs, grad, **settings):
    out = window_attention(*inputs, **settings)
    return [out, *torch.autograd.grad(out, inputs[:3], grad)]


def one_by_one(query, key, value, centers, maps):
    """Plain attention of each query to a list of its tokens, which is made by walking the maps."""
    batch, length, heads, dim = query.shape
    out = torch.zeros_like(query)
    for b in range(batch):
        for i in range(length):
            start, listed = 0, []
            for m, token_map in enumerate(maps):
                listed += [start + cell for cell in cells_of(token_map, centers[b, i, m].tolist())]
                start += token_map.height * token_map.width
            if listed:
                heads_first = (t.transpose(0, 1) for t in (query[b, i, None], key[b, listed], value[b, listed]))
                out[b, i] = scaled_dot_product_attention(*heads_first)[:, 0]
    return out


def test_each_query_attends_to_a_list_of_tokens(any_backend, device):
    """Centres on half cells, on and beyond borders, NaN, infinite, huge; windows larger than their map."""
    inputs, grad = arguments(1, 19, 2, 16, dtype=torch.float64, device=device)
    expected = one_by_one(*inputs, SMALL)
    gradients = torch.autograd.grad(expected, inputs[:3], grad)
    for actual, value in zip(with_gradients(inputs, grad, maps=SMALL, backend=any_backend), (expected, *gradients)):
        torch.testing.assert_close(actual, value)
    nowhere = ~expected.flatten(2).any(-1)
    assert nowhere.any() and not nowhere.all()


def test_equals_the_definition(backend, dtype, device, guarded_allocations):
    """Maps of several squares, and heads and rows that are no power of two."""
    maps = MAPS if backend == "torch" or device == "cuda" else MAPS[1:]
    inputs, grad = arguments(1, 20, 3, 24, maps, dtype=dtype, device=device)
    call = lambda *tensors, backend: window_attention(*tensors, maps=maps, backend=backend)  # noqa: E731
    assert_as_exact_as_the_definition(call, inputs, grad, backend, names=("out", "dquery", "dkey", "dvalue"))


def test_queries_that_are_nowhere_get_and_give_nothing(any_backend, device):
    """Whatever they and the tokens outside all windows hold."""
    inputs, grad = arguments(1, 6, 1, 16, device=device)
    inputs[3][:] = NAN
    results = with_gradients(inputs, grad, maps=SMALL, backend=any_backend)
    assert not any(result.any() for result in results)
    inputs[3][0, 2, 0] = 2.0
    results = with_gradients(inputs, grad, maps=SMALL, backend=any_backend)
    rows = results[0][0].flatten(1).any(-1), results[1][0].flatten(1).any(-1)
    assert all(row.nonzero().flatten().tolist() == [2] for row in rows)
    assert all(result.any() for result in results)
    for gradient in results[2:]:
        assert gradient[0].flatten(1).any(-1).nonzero().flatten().tolist() == cells_of(SMALL[0], (2.0, 2.0))


def test_tokens_outside_a_query_s_windows_are_not_read(any_backend, device):
    """What they hold does not matter, nor what queries hold that have no token: NaN would be seen."""
    inputs, grad = arguments(1, 6, 2, 16, device=device)
    centers = inputs[3]
    centers[:] = NAN
    centers[0, 2, 0], centers[0, 4, 1] = 2.0, 0.0
    read = torch.zeros(inputs[1].shape[1], dtype=torch.bool)
    read[cells_of(SMALL[0], (2.0, 2.0))] = True
    second = SMALL[0].height * SMALL[0].width
    read[[second + cell for cell in cells_of(SMALL[1], (0.0, 0.0))]] = True
    assert 0 < read.sum() < len(read)
    expected = with_gradients(inputs, grad, maps=SMALL, backend=any_backend)
    with torch.no_grad():
        for tensor in inputs[1:3]:
            tensor[:, ~read] = NAN
        inputs[0][:, [0, 1, 3, 5]] = NAN
    for actual, value in zip(with_gradients(inputs, grad, maps=SMALL, backend=any_backend), expected):
        assert torch.equal(actual, value)


def test_a_window_over_the_whole_map_is_plain_attention(any_backend, device):
    """However large the window; in the limit of an unbounded bias `window_bias_attention` is the same too."""
    inputs, grad = arguments(1, 5, 2, 16, device=device)
    inputs[3][:] = 1.0
    whole = tuple(TokenMap(height, width, 2**33) for height, width, _ in SMALL)
    query, key, value, _ = inputs
    expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)
    gradients = torch.autograd.grad(expected, inputs[:3], grad)
    for actual, one in zip(with_gradients(inputs, grad, maps=whole, backend=any_backend), (expected, *gradients)):
        torch.testing.assert_close(actual, one)
    inputs, _ = arguments(1, 8, 2, 16, device=device)
    inputs[3][:] = torch.rand_like(inputs[3])
    strong = torch.ones(1, 8, len(SMALL), device=device), torch.tensor(40.0, device=device)
    limits = dict(min_scale=0.0, max_scale=40.0, max_bias=40.0)
    biased = window_bias_attention(*inputs, *strong, maps=SMALL, **limits, backend=any_backend)
    torch.testing.assert_close(window_attention(*inputs, maps=SMALL, backend=any_backend), biased)


def test_scale(backend, device):
    inputs, grad = arguments(1, 5, 1, 16, dtype=torch.float64, device=device)
    factor = -1.7 * 16**0.5
    scaled = [(inputs[0] * factor).detach().requires_grad_(), *inputs[1:]]
    one = with_gradients(inputs, grad, maps=SMALL, scale=-1.7, backend=backend)
    other = with_gradients(scaled, grad, maps=SMALL, backend=backend)
    other[1] = other[1] * factor
    for actual, expected in zip(one, other):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_plain_backend(dtype):
    """At the size of system C: below a hundredth of what dense attention stores, the scores and their softmax."""
    maps = (TokenMap(128, 128, 5), *[TokenMap(20, 50, 8)] * 6)
    sizes = torch.tensor([[width, height] for height, width, _ in maps])
    query, key, value, grad = (torch.randn(1, n, 4, 64).to(dtype) for n in (900, 22_384, 22_384, 900))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    centers = torch.rand(1, 900, 7, 2) * sizes
    centers[:, :, 1:][torch.rand(1, 900, 6) < 0.8] = NAN  # a point is seen by one camera or two

    def step():
        out = window_attention(*inputs, centers, maps=maps, backend="torch")
        return out, torch.autograd.grad(out, inputs, grad)

    results = sum(t.numel() * t.element_size() for t in (query, *inputs))
    assert peak_on_cpu(lambda: None, step) - results < 0.01 * 2 * 4 * 900 * 22_384 * 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(2, 5, 2, 129)), ValueError, "query has dim = 129, needs 16 to 128"),
        (dict(key=torch.zeros(2, 86, 2, 16)), ValueError, r"key has shape \(2, 86, 2, 16\), .* = \(2, 87, 2, 16\)"),
        (dict(maps=SMALL[:3]), ValueError, r"key has shape \(2, 87, 2, 16\), needs .* = \(2, 42, 2, 16\)"),
        (dict(maps=()), ValueError, r"maps is \(\), needs at least one TokenMap"),
        (dict(maps=(TokenMap(3, 4, 0),)), ValueError, r"maps\[0\] is \(3, 4, 0\), needs TokenMap"),
        (dict(value=torch.zeros(2, 87, 2, 16).double()), TypeError, "value is float64, needs float32"),
        (dict(centers=torch.zeros(2, 5, 4, 2).half()), TypeError, "centers is float16, needs float32"),
        (dict(scale="1"), TypeError, "scale is a str, needs a finite number or None"),
        (dict(scale=NAN), ValueError, "scale is nan, needs a finite number"),
    ],
)
def test_bad_input(change, error, message):
    names = ("query", "key", "value", "centers")
    valid = dict(zip(names, (t.detach() for t in arguments(2, 5, 2, 16)[0])), maps=SMALL)
    with pytest.raises(error, match=f"^window_attention: {message}"):
        window_attention(**{**valid, **change})
