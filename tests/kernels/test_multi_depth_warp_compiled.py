"""multi_depth_warp compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only

NAMES = ("forward", "backward_target", "backward_features")
FORWARD, TARGET, FEATURES = (f"multi_depth_warp_{name}" for name in NAMES)


def launches(dtype, layout=torch.channels_last, channels=256, targets=12, depths=2, size=(28, 48), each=False):
    """Forward and backward with every optional argument; `each`: hypotheses with a map of their own."""
    from rigfuse.kernels.multi_depth_warp.triton import launch_backward, launch_forward

    features = torch.zeros(targets, channels, *size, dtype=dtype).to(memory_format=layout)
    geometry = torch.zeros(targets, 3, 4), torch.ones(depths)
    blend = torch.zeros(targets, depths, *size, dtype=dtype), torch.zeros(targets, depths, *size, 2)
    index = torch.zeros(targets, dtype=torch.int64)
    if each:
        geometry = torch.zeros(targets, depths, 3, 4), torch.ones(depths)
        index = torch.zeros(targets, depths, dtype=torch.int64)
    arguments = (features, *geometry, *blend, index, *size, False, 0.1)

    def launch():
        launch_forward(*arguments)
        launch_backward(features, *arguments, [True] * 3)

    return launch


@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.bfloat16, "nhwc"), (torch.float16, "nhwc"), (torch.float32, "nhwc"), (torch.bfloat16, "nchw")],
    ids=["bf16-nhwc", "fp16-nhwc", "fp32-nhwc", "bf16-nchw"],
)
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, dtype, layout, request):
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    forward, target, features = kernels = compile_launches(architecture, launches(dtype, memory_format))
    assert [kernel.name for kernel in kernels] == [FORWARD, TARGET, FEATURES]
    for kernel in kernels:
        case = f"{layout}/{str(dtype).removeprefix('torch.')}"
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
    if layout == "nhwc":
        assert forward.wide_loads >= 4, "the corners are not read 16 bytes a thread"
        assert target.wide_loads >= 5, "the corners and the gradient are not read 16 bytes a thread"
        assert features.wide_loads >= 1, "the gradient is not read 16 bytes a thread"
    if dtype != torch.float32:
        assert features.tensor_core_dots >= 1


@pytest.mark.parametrize("architecture", TARGETS)
def test_budget_of_hypotheses(architecture, request):
    for kernel in compile_launches(architecture, launches(torch.bfloat16, each=True, depths=6)):
        check_budget("hypotheses/bfloat16", kernel, request.config.getoption("--update-budgets"))
