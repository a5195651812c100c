"""deformable_aggregation compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only

FORWARD, SAMPLES, KEYS, MAPS = (
    f"deformable_aggregation_{name}" for name in ("forward", "backward_samples", "keys", "backward_maps")
)
SIZES = [(64, 176), (32, 88), (16, 44), (8, 22)]


def launches(dtype, layout=torch.channels_last, batch=1, anchors=900, points=13, cameras=6, channels=256, groups=8,
             sizes=SIZES, visible=True, needs_grad=None):  # fmt: skip
    """Forward and backward; the sort between the kernels of the backward runs on the CPU."""
    from rigfuse.kernels.deformable_aggregation.triton import launch_backward, launch_forward

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [
        torch.zeros(batch * cameras, channels, *size, dtype=dtype).to(memory_format=layout).unflatten(0, (batch, -1))
        for size in sizes
    ]
    places = torch.zeros(batch, anchors, points, cameras, 2, dtype=geometry)
    weights = torch.zeros(batch, anchors, points, cameras, len(sizes), groups)
    seen = torch.ones(batch, cameras, dtype=torch.bool) if visible else None
    needed = needs_grad or [True] * (len(sizes) + 2)

    def launch():
        out = launch_forward(maps, places, weights, seen)
        launch_backward(torch.zeros_like(out), maps, places, weights, seen, needed)

    return launch


@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.bfloat16, "nhwc"), (torch.float16, "nhwc"), (torch.float32, "nhwc"), (torch.bfloat16, "nchw")],
    ids=["bf16-nhwc", "fp16-nhwc", "fp32-nhwc", "bf16-nchw"],
)
@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, dtype, layout, request):
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    kernels = compile_launches(architecture, launches(dtype, memory_format))
    assert [kernel.name for kernel in kernels] == [FORWARD, SAMPLES, KEYS] + [MAPS] * len(SIZES)
    forward, samples, keys, *maps = kernels
    for kernel in (forward, samples, keys, maps[0]):
        case = f"{layout}/{str(dtype).removeprefix('torch.')}"
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
    if layout == "nhwc":
        assert forward.wide_loads >= len(SIZES), "the corners are not read 16 bytes a thread"
        assert samples.wide_loads >= len(SIZES), "the corners are not read 16 bytes a thread"
        assert all(kernel.wide_loads >= 1 for kernel in maps), "the gradient is not read 16 bytes a thread"
    for kernel in kernels:
        assert kernel.count(r"\b(RED|ATOM|ATOMG)\.|global_atomic|buffer_atomic") == 0, f"{kernel.name} uses atomics"


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (torch.bfloat16, dict(anchors=1, points=1, cameras=1, channels=1, groups=1, sizes=[(1, 1)], visible=False)),
        (torch.float64, dict(anchors=100, points=300, channels=48, groups=3)),
        (torch.bfloat16, dict(channels=1536, groups=1, sizes=[(5, 7)])),
    ],
    ids=["ones", "map head", "many channels"],
)
def test_specialises_on_any_size(dtype, sizes):
    """Sizes and strides of 1 become constants, which a kernel must not take for tensors."""
    levels = len(sizes.get("sizes", SIZES))
    assert len(compile_launches("sm_90", launches(dtype, **sizes))) == 3 + levels


def test_only_what_is_asked_for_is_launched():
    some = [False, True, False, False]
    kernels = compile_launches("sm_90", launches(torch.bfloat16, needs_grad=[*some, False, False]))
    assert [kernel.name for kernel in kernels] == [FORWARD, KEYS, MAPS]
    kernels = compile_launches("sm_90", launches(torch.bfloat16, needs_grad=[False] * 5 + [True]))
    assert [kernel.name for kernel in kernels] == [FORWARD, SAMPLES]
