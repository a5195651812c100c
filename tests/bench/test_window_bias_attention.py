"""The peers of window_bias_attention that only a GPU can time, computed here without their kernels."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.operations import window_bias_attention as window_bias
from rigfuse.bench.workload import Unavailable

OPERATION = OPERATIONS["window_bias_attention"]


@pytest.fixture
def inputs():
    sizes, generator = OPERATION.cases["tiny"], torch.Generator().manual_seed(0)
    return OPERATION.make_inputs(**sizes, dtype=torch.float64, device=torch.device("cpu"), generator=generator)


def on_a_gpu(inputs, monkeypatch):
    """As far as the providers can tell."""
    monkeypatch.setattr(type(inputs), "device", property(lambda self: torch.device("cuda")))


def with_gradients(function, inputs):
    leaves = [inputs.arguments[name].requires_grad_() for name in inputs.leaves]
    out = function(*inputs.arguments.values())
    return [out, *torch.autograd.grad(out, leaves, inputs.grad)]


def every_pair(query, key, value, score_mod):
    """What FlexAttention documents: the function is called for each score with its place."""
    batch, heads, length, dim = query.shape
    places = torch.meshgrid(*map(torch.arange, (batch, heads, length, key.shape[2])), indexing="ij")
    scores = score_mod(query @ key.mT * dim**-0.5, *places)
    return scores.softmax(-1) @ value


def test_flex_is_given_the_same_function(inputs, monkeypatch):
    expected = with_gradients(OPERATION.providers["eager"](inputs), inputs)
    assert all(result.abs().max() > 0 for result in expected)
    on_a_gpu(inputs, monkeypatch)
    monkeypatch.setattr(flex_module, "flex_attention", every_pair)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for actual, result in zip(with_gradients(window_bias.flex(inputs), inputs), expected):
        torch.testing.assert_close(actual, result, rtol=1e-10, atol=1e-12)


def test_a_kernel_of_sdpa_is_the_one_asked_for(inputs, monkeypatch):
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        OPERATION.providers["sdpa-math"](inputs)
    expected = with_gradients(OPERATION.providers["eager"](inputs), inputs)
    on_a_gpu(inputs, monkeypatch)
    for actual, result in zip(with_gradients(OPERATION.providers["sdpa-math"](inputs), inputs), expected):
        torch.testing.assert_close(actual, result, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="[Nn]o (available|viable)"):
        OPERATION.providers["sdpa-cudnn"](inputs)(*inputs.arguments.values())


def test_what_cannot_be_timed_on_a_cpu_says_so(inputs):
    with pytest.raises(Unavailable, match="no gradients on the CPU"):
        window_bias.flex(inputs)
