"""window_attention compiled for GPUs that are not there."""

from dataclasses import replace

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only
PREFIX = "window_attention_"
CASES = {  # dtype, head dim, float32 matmul precision
    "bfloat16-64": (torch.bfloat16, 64, "highest"),
    "bfloat16-40": (torch.bfloat16, 40, "highest"),
    "float16-128": (torch.float16, 128, "highest"),
    "float32-32": (torch.float32, 32, "highest"),
    "float32-64-tf32": (torch.float32, 64, "high"),
}


def launches(dtype, dim):
    """Forward and backward; the sort before the last kernel is made on the CPU."""
    from rigfuse.kernels.window_attention.triton import launch_backward, launch_forward

    maps = [20, 50, 8, 16, 32, 5]
    tokens = lambda length: torch.zeros(1, length, 2, dim, dtype=dtype)  # noqa: E731
    query, key = tokens(130), tokens(20 * 50 + 16 * 32)
    arguments = (query, key, key, torch.zeros(1, 130, 2, 2))
    launch_forward(*arguments, maps, dim**-0.5)
    launch_backward(query, query, torch.zeros(1, 2, 130), *arguments, maps, dim**-0.5, [True] * 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, case, request):
    dtype, dim, precision = CASES[case]
    kernels = compile_launches(architecture, lambda: launches(dtype, dim), precision)
    assert [kernel.name.removeprefix(PREFIX) for kernel in kernels] == [
        "windows", "forward", "windows", "backward_query", "backward_key",
    ]  # fmt: skip
    kernels[2] = replace(kernels[2], name=kernels[2].name + "_and_places")
    for kernel in kernels:
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
        assert kernel.count(r"\b(RED|ATOM|ATOMG)\.|global_atomic|buffer_atomic") == 0, f"{kernel.name} uses atomics"
    for kernel in (kernels[1], *kernels[3:]):
        assert kernel.wide_loads >= 2 or dim % 16, "keys and values are not read 16 bytes a thread"
    if dtype != torch.float32:
        assert kernels[4].count(r"MMA\.|tcgen05\.mma|v_mfma_") > 0
