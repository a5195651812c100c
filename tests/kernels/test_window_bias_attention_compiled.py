"""window_bias_attention compiled for GPUs that are not there."""

from dataclasses import replace

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only
PREFIX = "window_bias_attention_"
CASES = {  # dtype, head dim, float32 matmul precision
    "bfloat16-32": (torch.bfloat16, 32, "highest"),
    "bfloat16-40": (torch.bfloat16, 40, "highest"),
    "float16-128": (torch.float16, 128, "highest"),
    "float32-32": (torch.float32, 32, "highest"),
    "float32-64-tf32": (torch.float32, 64, "high"),
}


def launches(dtype, dim):
    from rigfuse.kernels.window_bias_attention.triton import launch_backward, launch_forward

    maps = [20, 50, 8, 16, 32, 5]
    tokens = lambda length: torch.zeros(1, length, 2, dim, dtype=dtype)  # noqa: E731
    query, key = tokens(130), tokens(20 * 50 + 16 * 32)
    arguments = (query, key, key, torch.zeros(1, 130, 2, 2), torch.zeros(1, 130, 2), torch.zeros(()))
    settings = (maps, 0.5, 5.0, 5.0, dim**-0.5)
    _, lse, order = launch_forward(*arguments, *settings)
    launch_backward(query, query, lse, order, *arguments, *settings, [True] * 5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, case, request):
    dtype, dim, precision = CASES[case]
    kernels = compile_launches(architecture, lambda: launches(dtype, dim), precision)
    assert [kernel.name.removeprefix(PREFIX) for kernel in kernels] == [
        "forward", "merge", "prepare", "backward_query", "merge", "reduce_bias", "backward_key",
    ]  # fmt: skip
    kernels[4] = replace(kernels[4], name=kernels[4].name + "_sum")  # the other merge is the softmax's
    for kernel in kernels:
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
    for kernel in (kernels[0], kernels[3], kernels[6]):
        assert kernel.wide_loads >= 2 or dim % 16, "keys and values are not read 16 bytes a thread"
        if dtype != torch.float32:
            assert kernel.tensor_core_dots > 0
        elif precision == "high":
            assert kernel.count(r"MMA\.|tcgen05\.mma|v_mfma_") > 0
