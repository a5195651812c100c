"""Triton backend: flash attention in which a key block is what a page is in paged attention.

A program owns one tile of one (block, head) and walks the table: queries the row of their block, keys the column of
theirs. What a program sums is summed in the order of the table; nothing is added atomically.
"""

import math

import torch
import triton
import triton.language as tl

from ..runtime import launch
from ..runtime.attention import dot_precision, head_of, load_rows, softmax_step, store_rows
from ..runtime.launch import Heads, Matrix, accumulator_dtype, strided, triton_dtype
from ..runtime.plans import enqueue
from . import configs


@triton.jit
def _load(
    tensor, head_ptr, start, mask, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr = True,
):  # fmt: skip
    """[BLOCK, BLOCK_D]: rows of a head from row `start` on; zeros beyond DIM and, if MASKED, where `mask` is False."""
    first = head_ptr + tl.cast(start, tl.int64) * tensor.row
    return load_rows(tensor, first, tl.arange(0, BLOCK), mask, MASKED, DIM, BLOCK_D)


@triton.jit
def _store(tensor, head_ptr, start, values, mask, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    first = head_ptr + tl.cast(start, tl.int64) * tensor.row
    store_rows(tensor, first, tl.arange(0, BLOCK), values, mask, DIM, BLOCK_D)


@triton.jit
def _keys_of(key_mask, block, offs_n, length_k):
    """[BLOCK_N]: which of the keys `offs_n` of `block` anybody attends to."""
    mask_n = offs_n < length_k
    if key_mask is not None:
        key_mask_ptr = key_mask.ptr + block.to(tl.int64) * key_mask.row + offs_n.to(tl.int64) * key_mask.column
        mask_n = tl.load(key_mask_ptr, mask=mask_n, other=0) != 0
    return mask_n


@triton.jit
def _listed(block_table, n, m, blocks, length_k):
    """The block of entry (n, m), and how many keys it has: none if the entry names no block."""
    block = tl.load(block_table.ptr + n.to(tl.int64) * block_table.row + m * block_table.column)
    return block, tl.where((block >= 0) & (block < blocks), length_k, 0)


@triton.jit
def _plain_end(key_mask, end_n, BLOCK_N: tl.constexpr):
    """The end of those tiles of keys that all count for certain: the full ones, where nothing is masked."""
    if key_mask is not None:
        return end_n * 0
    return end_n // BLOCK_N * BLOCK_N


@triton.jit
def _attend(
    q, m_i, l_i, acc, key, value, key_mask, key_head, value_head, block, start_n, length_k, scale_log2,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys. CAREFUL: some of them may not count."""
    mask_n = start_n + tl.arange(0, BLOCK_N) < length_k  # [BLOCK_N]
    if CAREFUL:
        mask_n = _keys_of(key_mask, block, start_n + tl.arange(0, BLOCK_N), length_k)
    k = _load(key, key_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D, CAREFUL)  # [BLOCK_N, BLOCK_D]
    # [BLOCK_M, BLOCK_N], as p
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
    if CAREFUL:  # a choice: −inf added to the scores of a query that is NaN would be NaN
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    p, m_i, l_i, acc = softmax_step(scores, m_i, l_i, acc, True)
    v = _load(value, value_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D, CAREFUL)  # [BLOCK_N, BLOCK_D]
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return m_i, l_i, acc


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
    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < length_q  # [BLOCK_M]
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    q = _load(query, head_of(query, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    m_i = tl.full([BLOCK_M], float("-inf"), ACC_DTYPE)
    l_i = tl.zeros([BLOCK_M], ACC_DTYPE)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
    for m in range(entries):
        block, end_n = _listed(block_table, n, m, blocks, length_k)
        key_head = head_of(key, block, head)
        value_head = head_of(value, block, head)
        plain_end = _plain_end(key_mask, end_n, BLOCK_N)
        if key_mask is None:
            for start_n in range(0, plain_end, BLOCK_N):
                m_i, l_i, acc = _attend(
                    q, m_i, l_i, acc, key, value, key_mask, key_head, value_head, block, start_n, length_k, scale_log2,
                    False, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
                )  # fmt: skip
        for start_n in range(plain_end, end_n, BLOCK_N):
            m_i, l_i, acc = _attend(
                q, m_i, l_i, acc, key, value, key_mask, key_head, value_head, block, start_n, length_k, scale_log2,
                True, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
            )  # fmt: skip

    # A query without any key: zeros, and +inf so that exp2(score − lse) is 0 in the backward pass.
    acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    lse = tl.where(l_i == 0, float("inf"), m_i + tl.log2(l_i))
    _store(out, head_of(out, n, head), start_m, acc, mask_m, BLOCK_M, DIM, BLOCK_D)
    tl.store(lse_ptr + (n * heads + head).to(tl.int64) * length_q + offs_m, lse, mask=mask_m)


@triton.jit
def _descend(
    q, do, lse, delta, dq, key, value, key_mask, key_head, value_head, block, start_n, length_k, scale_log2,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys. CAREFUL: some of them may not count."""
    mask_n = start_n + tl.arange(0, BLOCK_N) < length_k  # [BLOCK_N]
    if CAREFUL:
        mask_n = _keys_of(key_mask, block, start_n + tl.arange(0, BLOCK_N), length_k)
    k = _load(key, key_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D, CAREFUL)  # [BLOCK_N, BLOCK_D], as v
    v = _load(value, value_head, start_n, mask_n, BLOCK_N, DIM, BLOCK_D, CAREFUL)
    # [BLOCK_M, BLOCK_N], as p, dp and ds
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
    p = tl.exp2(scores - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC_DTYPE)
    ds = p * (dp - delta[:, None])
    if CAREFUL:
        ds = tl.where(mask_n[None, :], ds, 0.0)
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC_DTYPE)


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
    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < length_q  # [BLOCK_M]
    row = (n * heads + head).to(tl.int64) * length_q + offs_m  # [BLOCK_M]
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    do = _load(grad, head_of(grad, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D], as o, q, dq
    o = _load(out, head_of(out, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
    delta = tl.sum(do.to(ACC_DTYPE) * o.to(ACC_DTYPE), axis=1)  # [BLOCK_M], as lse
    tl.store(delta_ptr + row, delta, mask=mask_m)
    if dquery is not None:
        q = _load(query, head_of(query, n, head), start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=mask_m, other=float("inf"))
        dq = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
        for m in range(entries):
            block, end_n = _listed(block_table, n, m, blocks, length_k)
            key_head = head_of(key, block, head)
            value_head = head_of(value, block, head)
            plain_end = _plain_end(key_mask, end_n, BLOCK_N)
            if key_mask is None:
                for start_n in range(0, plain_end, BLOCK_N):
                    dq = _descend(
                        q, do, lse, delta, dq, key, value, key_mask, key_head, value_head, block, start_n, length_k,
                        scale_log2, False, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
                    )  # fmt: skip
            for start_n in range(plain_end, end_n, BLOCK_N):
                dq = _descend(
                    q, do, lse, delta, dq, key, value, key_mask, key_head, value_head, block, start_n, length_k,
                    scale_log2, True, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
                )  # fmt: skip
        dq *= tl.full([], scale, ACC_DTYPE)
        _store(dquery, head_of(dquery, n, head), start_m, dq, mask_m, BLOCK_M, DIM, BLOCK_D)


@triton.jit
def cross_camera_attention_transpose_table(
    block_table, queries, entries, blocks, start_ptr, reader_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compressed rows of the transposed table: key block s is read by the query blocks reader[start[s] : start[s + 1]].

    Program s scans the table. One entry more than there are key blocks, for the end of the last.
    """
    s = tl.program_id(0)
    size = queries * entries
    smaller = tl.zeros([BLOCK], tl.int32)  # [BLOCK], as all below
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        block_ptr = (
            block_table.ptr + (offs // entries).to(tl.int64) * block_table.row + offs % entries * block_table.column
        )
        block = tl.load(block_ptr, mask=offs < size, other=-1)
        smaller += ((block >= 0) & (block < s)).to(tl.int32)
    position = tl.sum(smaller, axis=0)
    tl.store(start_ptr + s, position)
    for first in range(0, tl.where(s < blocks, size, 0), BLOCK):
        offs = first + tl.arange(0, BLOCK)
        block_ptr = (
            block_table.ptr + (offs // entries).to(tl.int64) * block_table.row + offs % entries * block_table.column
        )
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
    offs_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = _keys_of(key_mask, block, offs_n, length_k)  # [BLOCK_N]
    scale_log2 = tl.full([], scale_log2, ACC_DTYPE)

    # [BLOCK_N, BLOCK_D], as v, dk and dv
    k = _load(key, head_of(key, block, head), start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
    v = _load(value, head_of(value, block, head), start_n, mask_n, BLOCK_N, DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    for i in range(tl.load(start_ptr + block), tl.load(start_ptr + block + 1)):
        n = tl.load(reader_ptr + i)
        query_head = head_of(query, n, head)
        grad_head = head_of(grad, n, head)
        row = (n * heads + head).to(tl.int64) * length_q
        for start_m in range(0, length_q, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M], as lse and delta
            mask_m = offs_m < length_q
            q = _load(query, query_head, start_m, mask_m, BLOCK_M, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D], as do
            do = _load(grad, grad_head, start_m, mask_m, BLOCK_M, DIM, BLOCK_D)
            lse = tl.load(lse_ptr + row + offs_m, mask=mask_m, other=float("inf"))
            # [BLOCK_N, BLOCK_M], as p, dp and ds
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
            p = tl.exp2(scores - lse[None, :])
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION, out_dtype=ACC_DTYPE)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            delta = tl.load(delta_ptr + row + offs_m, mask=mask_m, other=0.0)
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    dk *= tl.full([], scale, ACC_DTYPE)

    # Zeros, and not what a hostile query made of them, where nobody attends.
    written = offs_n < length_k
    if dkey is not None:
        dk = tl.where(mask_n[:, None], dk, 0.0)
        _store(dkey, head_of(dkey, block, head), start_n, dk, written, BLOCK_N, DIM, BLOCK_D)
    if dvalue is not None:
        dv = tl.where(mask_n[:, None], dv, 0.0)
        _store(dvalue, head_of(dvalue, block, head), start_n, dv, written, BLOCK_N, DIM, BLOCK_D)


def _dense(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(*tensors):
    return [strided(Heads, tensor) for tensor in tensors]


def _constants(query):
    """What all kernels of a call share."""
    dim = query.shape[-1]
    return dict(
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        ACC_DTYPE=triton_dtype(accumulator_dtype(query.dtype)),
        PRECISION=dot_precision(query.dtype, query.device),
    )


def _sizes(query, key):
    return launch.architecture(query.device), query.dtype.itemsize, query.shape[3], query.shape[1], key.shape[1]


def _mask_for(query, key_mask):
    """The mask as triton can load it: what is narrower than 8 bytes before a product in float64 fails to compile."""
    return key_mask.long() if key_mask is not None and query.dtype == torch.float64 else key_mask


def launch_forward(query, key, value, block_table, key_mask, scale):
    query, key, value = _dense(query), _dense(key), _dense(value)
    key_mask = _mask_for(query, key_mask)
    queries, length_q, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((queries, heads, length_q), dtype=accumulator_dtype(query.dtype), device=query.device)
    if out.numel():
        config = configs.tile("forward", *_sizes(query, key))
        enqueue(
            cross_camera_attention_forward, triton.cdiv(length_q, config["BLOCK_M"]) * queries * heads,
            *_strided(query, key, value), strided(Matrix, block_table), strided(Matrix, key_mask), *_strided(out), lse,
            scale * math.log2(math.e),
            heads, length_q, key.shape[1], key.shape[0], block_table.shape[1],
            **_constants(query), **config,
        )  # fmt: skip
    return out, lse


def launch_backward(grad, query, key, value, block_table, key_mask, out, lse, scale, needs_grad):
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    key_mask = _mask_for(query, key_mask)
    dquery, dkey, dvalue = gradients = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        for tensor, needed in zip((query, key, value), needs_grad)
    ]
    delta = torch.empty_like(lse)
    if query.numel():
        _launch_backward_query(grad, query, key, value, block_table, key_mask, out, lse, delta, dquery, scale)
    if key.numel() and (dkey is not None or dvalue is not None):
        _launch_backward_key(grad, query, key, value, block_table, key_mask, lse, delta, dkey, dvalue, scale)
    return gradients


def _launch_backward_query(grad, query, key, value, block_table, key_mask, out, lse, delta, dquery, scale):
    queries, length_q, heads, _ = query.shape
    config = configs.tile("backward_query", *_sizes(query, key))
    enqueue(
        cross_camera_attention_backward_query, triton.cdiv(length_q, config["BLOCK_M"]) * queries * heads,
        *_strided(grad, query, key, value), strided(Matrix, block_table), strided(Matrix, key_mask),
        *_strided(out), lse, delta, *_strided(dquery),
        scale * math.log2(math.e), scale,
        heads, length_q, key.shape[1], key.shape[0], block_table.shape[1],
        **_constants(query), **config,
    )  # fmt: skip


def _launch_backward_key(grad, query, key, value, block_table, key_mask, lse, delta, dkey, dvalue, scale):
    blocks, length_k, heads, _ = key.shape
    start = torch.empty(blocks + 1, dtype=torch.int32, device=key.device)
    reader = torch.empty(block_table.numel(), dtype=torch.int32, device=key.device)
    enqueue(
        cross_camera_attention_transpose_table, blocks + 1,
        strided(Matrix, block_table), *block_table.shape, blocks, start, reader, BLOCK=512,
    )  # fmt: skip
    config = configs.tile("backward_key", *_sizes(query, key))
    enqueue(
        cross_camera_attention_backward_key, triton.cdiv(length_k, config["BLOCK_N"]) * blocks * heads,
        *_strided(grad, query, key, value), start, reader, strided(Matrix, key_mask),
        lse, delta, *_strided(dkey, dvalue),
        scale * math.log2(math.e), scale,
        heads, query.shape[1], length_k,
        **_constants(query), **config,
    )  # fmt: skip
