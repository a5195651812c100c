"""cross_camera_attention compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only

HALF, SINGLE = torch.bfloat16, torch.float32
# dtype, float32 products, dim, Lk: the documents' heads, then the corners where registers are short; of dims that are
# no multiple of 16 the rows begin anywhere
CORNERS = {
    "sm_80": [
        (HALF, "highest", 32, 91), (HALF, "highest", 40, 704), (HALF, "highest", 128, 704),
        (SINGLE, "highest", 64, 704),
    ],
    "sm_90": [
        (HALF, "highest", 32, 91), (HALF, "highest", 40, 704), (HALF, "highest", 64, 704), (SINGLE, "high", 32, 91),
    ],
    "sm_100": [(HALF, "highest", 32, 91)],
    "gfx942": [(HALF, "highest", 32, 91), (SINGLE, "highest", 64, 704)],
}  # fmt: skip
CASES = [(architecture, *corner) for architecture in TARGETS for corner in CORNERS[architecture]]


def launch_all(dtype, dim, length_k):
    from rigfuse.kernels.cross_camera_attention.triton import launch_backward, launch_forward

    query = torch.zeros(2, 1400, 8, dim, dtype=dtype)
    key = torch.zeros(24, length_k, 8, dim, dtype=dtype)
    others = (torch.zeros(2, 12, dtype=torch.int64), torch.ones(24, length_k, dtype=torch.bool))

    def launch():
        out, lse = launch_forward(query, key, key, *others, 0.2)
        launch_backward(query, query, key, key, *others, out, lse, 0.2, [True] * 3)

    return launch


@pytest.mark.parametrize("architecture, dtype, precision, dim, length_k", CASES)
def test_budget(architecture, dtype, precision, dim, length_k, request):
    kernels = compile_launches(architecture, launch_all(dtype, dim, length_k), precision)
    names = [kernel.name.removeprefix("cross_camera_attention_") for kernel in kernels]
    assert names == ["forward", "backward_query", "transpose_table", "backward_key"]
    for kernel in kernels:
        case = f"{str(dtype).removeprefix('torch.')}-{precision}/{dim}"
        check_budget(case, kernel, request.config.getoption("--update-budgets"))
        if not kernel.name.endswith("transpose_table"):
            assert kernel.tensor_core_dots >= 2, "the products do not run on the tensor cores"
            # gfx942: 256 threads have less than 16 bytes each of the documents' small tiles
            if architecture != "gfx942" and dim % 16 == 0:
                assert kernel.wide_loads >= 4, "rows are not read 16 bytes a thread"


def test_tiles_suit_the_lengths():
    from rigfuse.kernels.cross_camera_attention.configs import tile

    documents = tile("forward", "sm_90", 2, 32, 1400, 91)
    assert (documents["BLOCK_M"], documents["BLOCK_N"]) == (64, 32)  # 3 · 32 = 96 for 91 keys, not 2 · 64
    assert tile("backward_key", "sm_90", 2, 32, 1400, 91)["BLOCK_N"] == 64  # or there is no warp-group product
    assert tile("forward", "sm_90", 2, 32, 1, 1)["BLOCK_M"] == tile("forward", "sm_90", 2, 32, 1, 1)["BLOCK_N"] == 16
