"""The public function."""

from numbers import Real

import torch

from ..runtime.autocast import to_autocast_dtype
from ..runtime.backends import choose_backend
from ..runtime.checks import FLOAT_DTYPES, INDEX_DTYPES, Shapes, check_dtype, check_indices, check_same_device
from ..runtime.nvtx import annotate

NAME = "cross_camera_attention"
MIN_DIM, MAX_DIM = 16, 128


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
        backend: None or "auto", "torch", "triton".

    Returns:
        (Nq, Lq, heads, dim) in `query`'s dtype (under autocast: the autocast dtype), contiguous.

    Raises:
        ValueError: a shape or device does not fit, or `block_table` on the CPU names a block outside [−1, S). On a GPU,
            where that is not read back, such a block counts as none.
        TypeError: a dtype is not supported, or the three dtypes differ.
        BackendError: the backend asked for cannot serve the call.
    """
    _validate_shapes(query, key, value, block_table, key_mask)
    query, key, value = (to_autocast_dtype(tensor) for tensor in (query, key, value))
    _validate_contents(query, key, value, block_table, key_mask, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_backend(backend, query, key, value, block_table, key_mask) == "torch":
        from .torch import cross_camera_attention as implementation
    else:
        from .ops import cross_camera_attention as implementation
    with annotate(NAME):
        return implementation(query, key, value, block_table, key_mask, scale)


def _validate_shapes(query, key, value, block_table, key_mask):
    shapes = Shapes(NAME)
    dim = shapes.bind("query", query, "Nq", "Lq", "heads", "dim")[-1]
    if not MIN_DIM <= dim <= MAX_DIM:
        raise ValueError(f"{NAME}: query has dim {dim}, needs {MIN_DIM} to {MAX_DIM}")
    length = shapes.bind("key", key, "S", "Lk", "heads", "dim")[1]
    if length == 0:
        raise ValueError(f"{NAME}: key has Lk = 0, needs at least 1")
    shapes.bind("value", value, "S", "Lk", "heads", "dim")
    shapes.bind("block_table", block_table, "Nq", "M")
    if key_mask is not None:
        shapes.bind("key_mask", key_mask, "S", "Lk")


def _validate_contents(query, key, value, block_table, key_mask, scale):
    check_dtype(NAME, "query", query, FLOAT_DTYPES)
    check_dtype(NAME, "key", key, (query.dtype,))
    check_dtype(NAME, "value", value, (query.dtype,))
    check_dtype(NAME, "block_table", block_table, INDEX_DTYPES)
    check_dtype(NAME, "key_mask", key_mask, (torch.bool,))
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f"{NAME}: scale is a {type(scale).__name__}, needs a float or None")
    check_same_device(NAME, "query", query, key=key, value=value, block_table=block_table, key_mask=key_mask)
    check_indices(NAME, "block_table", block_table, -1, key.shape[0])
