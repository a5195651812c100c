"""Peak memory: exact, repeatable, temporaries inside operators seen."""

import gc

import pytest
import torch
import torch.nn.functional as F

from rigfuse.bench.memory import peak_bytes, peak_on_cpu
from rigfuse.bench.workload import Call


def nothing():
    pass


def test_the_peak_is_exact():
    def function():
        first = torch.empty(1000)
        second = torch.empty(500)  # 6000 bytes here
        del first
        third = torch.empty(250)  # 3000 bytes at the end
        return second, third

    assert peak_on_cpu(nothing, function) == 6000


def test_results_count_and_inputs_do_not():
    x = torch.ones(1000)
    assert peak_on_cpu(nothing, lambda: x + x) == 4000
    assert peak_on_cpu(nothing, lambda: x.add_(x)) == 0


def test_temporaries_inside_operators_are_seen():
    query = torch.ones(1, 1, 64, 16)
    mask = torch.ones(64, 64, dtype=torch.bool)

    def attention():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    assert peak_on_cpu(nothing, attention) >= 64 * 64 * 4 + query.numel() * 4


def test_releasing_what_was_prepared_makes_room():
    kept = []

    def replace():
        kept.clear()
        kept.append(torch.empty(1000))

    assert peak_on_cpu(lambda: kept.append(torch.empty(1000)), replace) == 0
    kept.clear()


@pytest.mark.parametrize("mode", ["fwd", "fwd-bwd"])
def test_a_call_is_measured_alike_every_time(mode):
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.GELU())
    x = torch.ones(1, 4, 16, 16)
    call = Call(lambda: layers(x), dict(layers.named_parameters()), torch.ones(1, 8, 16, 16))
    peaks = {peak_bytes(call, mode, torch.device("cpu")) for _ in range(3)}
    assert len(peaks) == 1
    assert peaks.pop() >= 8 * 16 * 16 * 4
    assert gc.isenabled()


def test_the_backward_pass_needs_more_than_the_forward_pass():
    weight = torch.ones(64, 64, requires_grad=True)
    call = Call(lambda: weight.neg().relu(), dict(weight=weight), torch.ones(64, 64))
    forward, both = (peak_bytes(call, mode, torch.device("cpu")) for mode in ("fwd", "fwd-bwd"))
    assert forward == 2 * 64 * 64 * 4
    assert both == 3 * 64 * 64 * 4  # output, gradient of the negative, gradient of the weight
