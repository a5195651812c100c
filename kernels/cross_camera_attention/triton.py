"""Triton backend: flash attention in which a key block is what a page is in paged attention.

A program owns one tile of one (block, head) and walks the table: queries the row of their block, keys the column of
theirs. What a program sums is summed in the order of the table; nothing is added atomically.
"""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch
from ..runtime.launch import accumulator_dtype, strided, triton_dtype
from . import configs


@triton.jit
def _head(tensor, block, head):
    """Pointer to the first row of `head` in `block`."""
    return tensor[0] + block.to(tl.int64) * tensor[1] + head.to(tl.int64) * tensor[3]


@triton.jit
def _rows(tensor, head_ptr, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to BLOCK rows of a head from row `start` on."""
    first = head_ptr + tl.cast(start, tl.int64) * tensor[2]
    return first + tl.arange(0, BLOCK)[:, None] * tensor[2] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(tensor, head_ptr, start, mask, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) rows; zeros where `mask` is False and beyond DIM."""
    mask = mask[:, None]
    if DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return tl.load(_rows(tensor, head_ptr, start, BLOCK, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def _store(tensor, head_ptr, start, rows, mask, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = mask[:, None]
    if DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    tl.store(_rows(tensor, head_ptr, start, BLOCK, BLOCK_D), rows.to(tensor[0].dtype.element_ty), mask=mask)


@triton.jit
def _keys_of(key_mask, block, offs_n, length_k):
    """Which of the keys `offs_n` of `block` anybody attends to."""
    mask_n = offs_n < length_k
    if key_mask[0] is not None:
        key_mask_ptr = key_mask[0] + block.to(tl.int64) * key_mask[1] + offs_n.to(tl.int64) * key_mask[2]
        mask_n = tl.load(key_mask_ptr, mask=mask_n, other=0) != 0
    return mask_n


@triton.jit
def _listed(block_table, n, m, blocks, length_k):
    """The block of entry (n, m), and how many keys it has: none if the entry names no block."""
    block = tl.load(block_table[0] + n.to(tl.int64) * block_table[1] + m * block_table[2])
    return block, tl.where((block >= 0) & (block < blocks), length_k, 0)


@triton.jit
def cross_camera_attention_forward(
    query, key, value, block_table, key_mask, out, lse_ptr,
    scale_log2: tl.float64,
    heads, length_q, length_k, blocks, entries,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length_q, BLOCK_M)
    n = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    start_m = (tl.program_id(0) % tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length_q
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    q = _load(query, _head(query, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), ACC_DTYPE)
    l_i = tl.zeros([BLOCK_M], ACC_DTYPE)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
    for m in range(entries):
        block, end_n = _listed(block_table, n, m, blocks, length_k)
        key_head = _head(key, block, head)
        value_head = _head(value, block, head)
        for start_n in range(0, end_n, BLOCK_N):
            mask_n = _keys_of(key_mask, block, start_n + tl.arange(0, BLOCK_N), length_k)
            k = _load(key, key_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
            scores = tl.where(mask_n[None, :], scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, axis=1))
            # No key so far: any finite maximum serves, −inf − (−inf) would not.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(scores - shift[:, None])
            alpha = tl.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            v = _load(value, value_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
            acc = acc * alpha[:, None]
            acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC_DTYPE)
            m_i = m_new

    # A query without any key: zeros, and +inf so that exp2(score − lse) is 0 in the backward pass.
    acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    lse = tl.where(l_i == 0, float("inf"), m_i + tl.log2(l_i))
    _store(out, _head(out, n, head), start_m, acc, mask_m, BLOCK_M, DIM, BLOCK_D)
    tl.store(lse_ptr + (n * heads + head).to(tl.int64) * length_q + offs_m, lse, mask=mask_m)


@triton.jit
def cross_camera_attention_backward_query(
    grad, query, key, value, block_table, key_mask, out, lse_ptr, delta_ptr, dquery,
    scale_log2: tl.float64, scale: tl.float64,
    heads, length_q, length_k, blocks, entries,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad · out) for every query, and dquery unless nobody asks for it."""
    tiles = tl.cdiv(length_q, BLOCK_M)
    n = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    start_m = (tl.program_id(0) % tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length_q
    row = (n * heads + head).to(tl.int64) * length_q + offs_m
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    do = _load(grad, _head(grad, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
    o = _load(out, _head(out, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
    delta = tl.sum(do.to(ACC_DTYPE) * o.to(ACC_DTYPE), axis=1)
    tl.store(delta_ptr + row, delta, mask=mask_m)
    if dquery[0] is None:
        return

    q = _load(query, _head(query, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
    lse = tl.load(lse_ptr + row, mask=mask_m, other=float("inf"))
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
    for m in range(entries):
        block, end_n = _listed(block_table, n, m, blocks, length_k)
        key_head = _head(key, block, head)
        value_head = _head(value, block, head)
        for start_n in range(0, end_n, BLOCK_N):
            mask_n = _keys_of(key_mask, block, start_n + tl.arange(0, BLOCK_N), length_k)
            k = _load(key, key_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
            v = _load(value, value_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
            p = tl.exp2(scores - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            ds = tl.where(mask_n[None, :], p * (dp - delta[:, None]), 0.0)
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    dq *= tl.full([], scale, ACC_DTYPE)
    _store(dquery, _head(dquery, n, head), start_m, dq, mask_m, BLOCK_M, DIM, BLOCK_D)


@triton.jit
def transpose_table(block_table, queries, entries, blocks, start_ptr, reader_ptr, BLOCK: tl.constexpr):
    """Compressed rows of the transposed table: key block s is read by the query blocks reader[start[s] : start[s + 1]].

    Program s scans the table. One entry more than there are key blocks, for the end of the last.
    """
    s = tl.program_id(0)
    size = queries * entries
    smaller = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        block_ptr = block_table[0] + (offs // entries).to(tl.int64) * block_table[1] + offs % entries * block_table[2]
        block = tl.load(block_ptr, mask=offs < size, other=-1)
        smaller += ((block >= 0) & (block < s)).to(tl.int32)
    position = tl.sum(smaller, axis=0)
    tl.store(start_ptr + s, position)
    for first in range(0, tl.where(s < blocks, size, 0), BLOCK):
        offs = first + tl.arange(0, BLOCK)
        block_ptr = block_table[0] + (offs // entries).to(tl.int64) * block_table[1] + offs % entries * block_table[2]
        found = (tl.load(block_ptr, mask=offs < size, other=-1) == s).to(tl.int32)
        tl.store(reader_ptr + position + tl.cumsum(found, axis=0) - 1, offs // entries, mask=found != 0)
        position += tl.sum(found, axis=0)


@triton.jit
def cross_camera_attention_backward_key(
    grad, query, key, value, start_ptr, reader_ptr, key_mask, lse_ptr, delta_ptr, dkey, dvalue,
    scale_log2: tl.float64, scale: tl.float64,
    heads, length_q, length_k,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length_k, BLOCK_N)
    block = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    start_n = (tl.program_id(0) % tiles) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = _keys_of(key_mask, block, offs_n, length_k)
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    k = _load(key, _head(key, block, head), start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
    v = _load(value, _head(value, block, head), start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    for i in range(tl.load(start_ptr + block), tl.load(start_ptr + block + 1)):
        n = tl.load(reader_ptr + i)
        query_head = _head(query, n, head)
        grad_head = _head(grad, n, head)
        row = (n * heads + head).to(tl.int64) * length_q
        for start_m in range(0, length_q, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length_q
            q = _load(query, query_head, start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
            do = _load(grad, grad_head, start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
            lse = tl.load(lse_ptr + row + offs_m, mask=mask_m, other=float("inf"))
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
            p = tl.exp2(scores - lse[None, :])  # (BLOCK_N, BLOCK_M)
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION, out_dtype=ACC_DTYPE)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            delta = tl.load(delta_ptr + row + offs_m, mask=mask_m, other=0.0)
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    dk *= tl.full([], scale, ACC_DTYPE)

    # Zeros, and not what a hostile query made of them, where nobody attends.
    written = offs_n < length_k
    if dkey[0] is not None:
        dk = tl.where(mask_n[:, None], dk, 0.0)
        _store(dkey, _head(dkey, block, head), start_n, dk, written, BLOCK_N, DIM, BLOCK_D)
    if dvalue[0] is not None:
        dv = tl.where(mask_n[:, None], dv, 0.0)
        _store(dvalue, _head(dvalue, block, head), start_n, dv, written, BLOCK_N, DIM, BLOCK_D)


def _dense(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _constants(query):
    """What all kernels of a call share."""
    dim = query.shape[-1]
    return dict(
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        ACC_DTYPE=triton_dtype(accumulator_dtype(query.dtype)),
        PRECISION=_precision(query),
    )


def _precision(query):
    """How exact float32 products are is the user's to say, as for every matrix product of PyTorch."""
    if query.dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    # Three tf32 products make a float32 one but for its last bits. Those without tensor cores keep whole rows of their
    # operands in registers, of which none are left at dim 64.
    return "tf32x3" if launch.architecture(query.device).startswith("sm_") else "ieee"


def _sizes(query, key):
    return launch.architecture(query.device), query.dtype.itemsize, query.shape[3], query.shape[1], key.shape[1]


def launch_forward(query, key, value, block_table, key_mask, scale):
    query, key, value = _dense(query), _dense(key), _dense(value)
    queries, length_q, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((queries, heads, length_q), dtype=accumulator_dtype(query.dtype), device=query.device)
    if out.numel():
        config = configs.tile("forward", *_sizes(query, key))
        cross_camera_attention_forward[(triton.cdiv(length_q, config["BLOCK_M"]) * queries * heads,)](
            strided(query), strided(key), strided(value), strided(block_table), strided(key_mask), strided(out), lse,
            scale * math.log2(math.e),
            heads, length_q, key.shape[1], key.shape[0], block_table.shape[1],
            **_constants(query), **config,
        )  # fmt: skip
    return out, lse


def launch_backward(grad, query, key, value, block_table, key_mask, out, lse, scale, needs_grad):
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    dquery, dkey, dvalue = grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        for tensor, needed in zip((query, key, value), needs_grad)
    ]
    delta = torch.empty_like(lse)
    if query.numel():
        _launch_backward_query(grad, query, key, value, block_table, key_mask, out, lse, delta, dquery, scale)
    if key.numel() and (dkey is not None or dvalue is not None):
        _launch_backward_key(grad, query, key, value, block_table, key_mask, lse, delta, dkey, dvalue, scale)
    return [g for g in grads if g is not None]


def _launch_backward_query(grad, query, key, value, block_table, key_mask, out, lse, delta, dquery, scale):
    queries, length_q, heads, _ = query.shape
    config = configs.tile("backward_query", *_sizes(query, key))
    cross_camera_attention_backward_query[(triton.cdiv(length_q, config["BLOCK_M"]) * queries * heads,)](
        strided(grad), strided(query), strided(key), strided(value), strided(block_table), strided(key_mask),
        strided(out), lse, delta, strided(dquery),
        scale * math.log2(math.e), scale,
        heads, length_q, key.shape[1], key.shape[0], block_table.shape[1],
        **_constants(query), **config,
    )  # fmt: skip


def _launch_backward_key(grad, query, key, value, block_table, key_mask, lse, delta, dkey, dvalue, scale):
    blocks, length_k, heads, _ = key.shape
    start = torch.empty(blocks + 1, dtype=torch.int32, device=key.device)
    reader = torch.empty(block_table.numel(), dtype=torch.int32, device=key.device)
    transpose_table[(blocks + 1,)](strided(block_table), *block_table.shape, blocks, start, reader, BLOCK=512)
    config = configs.tile("backward_key", *_sizes(query, key))
    cross_camera_attention_backward_key[(triton.cdiv(length_k, config["BLOCK_N"]) * blocks * heads,)](
        strided(grad), strided(query), strided(key), strided(value), start, reader, strided(key_mask),
        lse, delta, strided(dkey), strided(dvalue),
        scale * math.log2(math.e), scale,
        heads, query.shape[1], length_k,
        **_constants(query), **config,
    )  # fmt: skip
