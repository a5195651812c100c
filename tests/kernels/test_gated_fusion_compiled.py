"""gated_fusion compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, dtype, layout, request):
    from rigfuse.kernels.gated_fusion.triton import launch_backward, launch_forward

    image = lambda channels: torch.zeros(2, channels, 28, 48, dtype=dtype).to(memory_format=layout)  # noqa: E731
    arguments = (image(256), image(256), image(1), image(256), image(1), torch.ones(2, dtype=torch.bool))

    def launch():
        launch_forward(*arguments)
        launch_backward(image(256), *arguments, [True] * 5)

    kernels = compile_launches(architecture, launch)
    assert [kernel.name for kernel in kernels] == ["gated_fusion_forward", "gated_fusion_backward"]
    case = f"{'nhwc' if layout == torch.channels_last else 'nchw'}/{str(dtype).removeprefix('torch.')}"
    for kernel in kernels:
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
        assert kernel.wide_loads >= 3, "the image-sized inputs are not read 16 bytes a thread"
