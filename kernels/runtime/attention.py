"""What the attention kernels share: rows of a head, the step of an online softmax, the precision of products."""

import torch
import triton
import triton.language as tl

from . import launch


@triton.jit
def head_of(tensor, block, head):
    """Pointer to the first row of a head of (blocks, length, heads, dim)."""
    return tensor.ptr + block.to(tl.int64) * tensor.block + head.to(tl.int64) * tensor.head


@triton.jit
def _pointers(tensor, head_ptr, rows, BLOCK_D: tl.constexpr):
    return head_ptr + rows[:, None] * tensor.row + tl.arange(0, BLOCK_D)[None, :] * tensor.column  # [rows, BLOCK_D]


@triton.jit
def load_rows(tensor, head_ptr, rows, mask, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: the rows of a head; zeros beyond DIM and, if MASKED, where `mask` [rows] is False."""
    pointers = _pointers(tensor, head_ptr, rows, BLOCK_D)
    within = (tl.arange(0, BLOCK_D) < DIM)[None, :]  # [1, BLOCK_D]
    if MASKED and DIM < BLOCK_D:
        return tl.load(pointers, mask=mask[:, None] & within, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    if DIM < BLOCK_D:
        return tl.load(pointers, mask=within, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(tensor, head_ptr, rows, values, mask, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `values` [rows, BLOCK_D] up to DIM, where `mask` [rows] is True."""
    mask = mask[:, None]  # [rows, 1]
    if DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]  # [rows, BLOCK_D]
    tl.store(_pointers(tensor, head_ptr, rows, BLOCK_D), values.to(tensor.ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(scores, m_i, l_i, acc, MAY_BE_EMPTY: tl.constexpr):
    """One tile of `scores` [BLOCK_M, BLOCK_N], in base 2, of an online softmax.

    m_i, l_i [BLOCK_M]: the largest score and the sum so far; acc [BLOCK_M, BLOCK_D]: what is attended to so far.
    MAY_BE_EMPTY: a row may have had no key yet, its scores all −inf.

    Returns the shares of the tile, to be multiplied with its values and added to acc, and the three.
    """
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))  # [BLOCK_M]
    shift = m_new  # [BLOCK_M]
    if MAY_BE_EMPTY:
        # Any finite maximum serves, −inf − (−inf) would not.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - shift[:, None])  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2(m_i - shift)  # [BLOCK_M]
    return p, m_new, l_i * alpha + tl.sum(p, axis=1), acc * alpha[:, None]


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Returns how products of `dtype` are formed, which for float32 is the user's to say, as everywhere in PyTorch.

    "highest" means three tf32 products in place of each, a float32 product but for its last bits, on the tensor cores.
    Where there are none for tf32 it means float32 products.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if launch.architecture(device).startswith("sm_") else "ieee"
