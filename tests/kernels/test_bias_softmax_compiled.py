"""bias_softmax compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only


@pytest.mark.parametrize("keys", [16_384, 22_384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, dtype, keys, request):
    from rigfuse.kernels.bias_softmax.triton import launch_backward, launch_forward

    scores, bias, bias_scale = torch.zeros(1, 8, 4, keys, dtype=dtype), torch.zeros(1, 1, 4, keys), torch.zeros(())

    def launch():
        launch_forward(scores, bias, bias_scale, 0.5, 5.0, 5.0)
        launch_backward(scores, scores, bias, bias_scale, 0.5, 5.0, 5.0, [True] * 3)

    case, update = f"{keys}/{str(dtype).removeprefix('torch.')}", request.config.getoption("--update-budgets")
    kernels = compile_launches(architecture, launch)
    names = ["forward", "backward"] if keys == 16_384 else ["forward", "delta", "backward"]
    assert [kernel.name for kernel in kernels] == [f"bias_softmax_{name}" for name in names]
    for kernel in kernels:
        check_budget(case, kernel, update)
        assert kernel.wide_loads >= 2, "rows are not read 16 bytes a thread"
