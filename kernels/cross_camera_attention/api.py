"""The public function."""

import torch

from ..runtime.arguments import Argument, Arguments, any_float, boolean, index, same_float
from ..runtime.checks import check_indices, check_number
from . import ops

NAME = "cross_camera_attention"
ARGUMENTS = Arguments(
    NAME,
    query=Argument((("Nq", "Lq", "heads", "dim"),), any_float, gradient=True, autocast=True),
    key=Argument((("S", "Lk", "heads", "dim"),), same_float, gradient=True, autocast=True),
    value=Argument((("S", "Lk", "heads", "dim"),), same_float, gradient=True, autocast=True),
    block_table=Argument((("Nq", "M"),), index),
    key_mask=Argument((("S", "Lk"),), boolean, optional=True),
    limits={"dim": (16, 128), "Lk": (1, None)},
)
OPERATION = ops.register(ARGUMENTS)


def cross_camera_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each block of queries over all keys of the key blocks that its row of `block_table` lists.

    The topology is only the table: which camera of which history frame a missing camera looks at. A block named twice
    counts twice. A query without any key gives zeros, and takes and gives no gradient. Keys that nobody attends to may
    hold anything, NaN included. Neither scores nor gathered keys are stored by the Triton backend.

    Computed in float32 (float64 for float64) from operands in their own dtype. On a GPU float32 products use tf32, or
    three tf32 products in place of each (on AMD, float32) where `torch.get_float32_matmul_precision()` is "highest".
    Under autocast query, key and value are cast to the autocast dtype, float64 excepted, as
    scaled_dot_product_attention does.

    Args:
        query: (Nq, Lq, heads, dim), one block of queries for each missing camera; 16 ≤ dim ≤ 128. Gets gradients.
        key: (S, Lk, heads, dim), one block for each camera of each history frame, in `query`'s dtype. Gets gradients.
        value: (S, Lk, heads, dim) in `query`'s dtype. Gets gradients.
        block_table: (Nq, M) int32 or int64, the key blocks of each query block; −1 = none.
        key_mask: (S, Lk) bool; False = nobody attends to this key. None = every key counts.
        scale: factor on the scores before the softmax; None = dim ** −0.5.
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        (Nq, Lq, heads, dim) in `query`'s dtype (under autocast: the autocast dtype), contiguous.

    Raises:
        ValueError: a shape or device does not fit, `scale` is not finite, or `block_table` on the CPU names a block
            outside [−1, S). On a GPU, where that is not read back, such a block counts as none.
        TypeError: a dtype is not supported, or the three dtypes differ.
        BackendError: the backend asked for cannot serve the call.
    """
    tensors, sizes = ARGUMENTS.check(query, key, value, block_table, key_mask)
    if scale is not None:
        check_number(NAME, "scale", scale, "a finite number or None")
    check_indices(NAME, "block_table", block_table, -1, sizes["S"])
    return OPERATION(backend, tensors, sizes["dim"] ** -0.5 if scale is None else float(scale))
