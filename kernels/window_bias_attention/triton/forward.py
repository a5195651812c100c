"""Forward: every program attends to one piece of the keys; the pieces are merged in their order."""

import torch
import triton
import triton.language as tl

from ...runtime import launch
from ...runtime.attention import dot_precision, head_of, load_rows, softmax_step, store_rows
from ...runtime.launch import Heads, accumulator_dtype, strided, triton_dtype
from ...runtime.plans import enqueue
from .. import configs
from ..order import query_order
from .primitives import (
    LOG2_E,
    Centers,
    Weights,
    inside,
    piece,
    pieces,
    queries,
    window_bias,
    windows,
)


@triton.jit
def _attend(
    q, m_i, l_i, acc, key, value, key_ptr, value_ptr, cell, end, bias, top, left, width, window, scale_log2,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from `cell` on. CAREFUL: a window may touch it, and it may reach beyond `end`."""
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = cell + offs_n < end  # [BLOCK_N]
    skipped = tl.cast(cell, tl.int64)
    k = load_rows(key, key_ptr + skipped * key.row, offs_n, mask_n, CAREFUL, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    # [BLOCK_M, BLOCK_N], as near and p
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
    if CAREFUL:
        near = inside((cell + offs_n)[None, :], width, top[:, None], left[:, None], window)
        scores = tl.where(mask_n[None, :], scores + tl.where(near, bias[:, None], 0.0), float("-inf"))
    p, m_i, l_i, acc = softmax_step(scores, m_i, l_i, acc, False)
    v = load_rows(value, value_ptr + skipped * value.row, offs_n, mask_n, CAREFUL, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return m_i, l_i, acc


@triton.jit
def window_bias_attention_forward(
    query, key, value, centers, weights, bias_scale_ptr, order_ptr, partial, lse_ptr, maps,
    scale: tl.float64, min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    batch, length, heads, split,
    MAPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same keys.
    tiles = tl.cdiv(length, BLOCK_M)
    number = tl.program_id(0) // tiles // heads // batch
    b = tl.program_id(0) // tiles // heads % batch
    head = tl.program_id(0) // tiles % heads
    m, start, begin, end, height, width, window = piece(number, split, maps, MAPS)
    # [BLOCK_M], as top, left and bias
    offs_i, mask_m = queries(order_ptr, b, m, tl.program_id(0) % tiles * BLOCK_M, length, MAPS, BLOCK_M)
    top, left, first_near, end_near = windows(centers, b, offs_i, mask_m, m, height, width, window)
    bias = window_bias(weights, bias_scale_ptr, b, offs_i, mask_m, m, min_scale, max_scale, max_bias, ACC_DTYPE)
    q = load_rows(query, head_of(query, b, head), offs_i, mask_m, True, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    key_ptr = head_of(key, b, head) + tl.cast(start, tl.int64) * key.row
    value_ptr = head_of(value, b, head) + tl.cast(start, tl.int64) * value.row
    scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E

    # Full tiles that no window touches first, then those that one touches, then the ragged last one.
    full_end = begin + (end - begin) // BLOCK_N * BLOCK_N
    first_near = tl.minimum(tl.maximum(first_near // BLOCK_N * BLOCK_N, begin), full_end)
    end_near = tl.minimum(tl.maximum(tl.cdiv(end_near, BLOCK_N) * BLOCK_N, first_near), full_end)
    near = end_near - first_near
    m_i = tl.full([BLOCK_M], float("-inf"), ACC_DTYPE)
    l_i = tl.zeros([BLOCK_M], ACC_DTYPE)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
    for cell in range(begin, full_end - near, BLOCK_N):
        m_i, l_i, acc = _attend(
            q, m_i, l_i, acc, key, value, key_ptr, value_ptr, tl.where(cell < first_near, cell, cell + near),
            end, bias, top, left, width, window, scale_log2, False, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
        )  # fmt: skip
    # Half as large, since they need more registers, which the others would have to do without.
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else BLOCK_N
    for cell in range(first_near, end_near + end - full_end, HALF):
        m_i, l_i, acc = _attend(
            q, m_i, l_i, acc, key, value, key_ptr, value_ptr,
            tl.where(cell < end_near, cell, cell - end_near + full_end),
            end, bias, top, left, width, window, scale_log2, True, PRECISION, DIM, BLOCK_D, HALF, ACC_DTYPE,
        )  # fmt: skip

    b += number * batch
    store_rows(partial, head_of(partial, b, head), offs_i, acc / l_i[:, None], mask_m, DIM, BLOCK_D)
    tl.store(lse_ptr + (b * heads + head).to(tl.int64) * length + offs_i, m_i + tl.log2(l_i), mask=mask_m)


@triton.jit
def window_bias_attention_merge(
    partial, partial_lse_ptr, out, lse_ptr, splits, batch, length, heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums the pieces; with logarithms of their sums (base 2), as shares of one softmax."""
    tiles = tl.cdiv(length, BLOCK_M)
    b = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    offs_i = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    mask_m = offs_i < length  # [BLOCK_M], as all below but acc and part
    dtype: tl.constexpr = partial.ptr.dtype.element_ty
    row = (b * heads + head).to(tl.int64) * length + offs_i
    if partial_lse_ptr is not None:
        partial_lse_ptr += row
        step = tl.cast(batch, tl.int64) * heads * length
        largest = tl.full([BLOCK_M], float("-inf"), dtype)
        for number in range(splits):
            largest = tl.maximum(largest, tl.load(partial_lse_ptr + number * step, mask=mask_m, other=0.0))
        total = tl.zeros([BLOCK_M], dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype)  # as part
    for number in range(splits):
        part = load_rows(partial, head_of(partial, b + number * batch, head), offs_i, mask_m, True, DIM, BLOCK_D)
        if partial_lse_ptr is not None:
            share = tl.exp2(tl.load(partial_lse_ptr + number * step, mask=mask_m, other=0.0) - largest)
            total += share
            part *= share[:, None]
        acc += part
    if partial_lse_ptr is not None:
        acc /= total[:, None]
        tl.store(lse_ptr + row, largest + tl.log2(total), mask=mask_m)
    store_rows(out, head_of(out, b, head), offs_i, acc, mask_m, DIM, BLOCK_D)


def merge(partial, partial_lse, out, lse):
    """Into `out` (B, length, heads, dim), and `lse` if given, from the pieces (pieces · B, length, heads, dim)."""
    batch, length, heads, dim = out.shape
    block_d = triton.next_power_of_2(dim)
    block_m = max(8, 2048 // block_d)
    enqueue(
        window_bias_attention_merge, triton.cdiv(length, block_m) * heads * batch,
        strided(Heads, partial), partial_lse, strided(Heads, out), lse, len(partial) // batch, batch, length, heads,
        DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def launch_forward(
    query, key, value, centers, weights, bias_scale, maps, min_scale, max_scale, max_bias, scale
):  # fmt: skip
    batch, length, heads, dim = query.shape
    dtype = accumulator_dtype(query.dtype)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=dtype, device=query.device)
    order = query_order(centers)
    if query.numel() == 0:
        return out, lse, order
    architecture = launch.architecture(query.device)
    config = configs.forward(architecture, query.element_size(), dim)
    tiles = triton.cdiv(length, config["BLOCK_M"])
    split = configs.split(architecture, tiles * batch * heads, key.shape[1], config["BLOCK_N"])
    splits = sum(pieces(maps, split))
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty((splits * batch, *out.shape[1:]), dtype=dtype, device=out.device)
        partial_lse = torch.empty((splits * batch, *lse.shape[1:]), dtype=dtype, device=out.device)
    enqueue(
        window_bias_attention_forward, tiles * heads * batch * splits,
        strided(Heads, query), strided(Heads, key), strided(Heads, value),
        strided(Centers, centers), strided(Weights, weights), bias_scale, order,
        strided(Heads, partial), partial_lse, tuple(maps),
        scale, min_scale, max_scale, max_bias, batch, length, heads, split,
        MAPS=len(maps) // 3, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        ACC_DTYPE=triton_dtype(dtype), PRECISION=dot_precision(query.dtype, query.device), **config,
    )  # fmt: skip
    if splits > 1:
        merge(partial, partial_lse, out, lse)
    return out, lse, order
