"""Backward: queries walk one piece of the keys each, keys walk all queries. Every sum has a fixed order."""

import torch
import triton
import triton.language as tl

from ...runtime import launch
from ...runtime.attention import dot_precision, head_of, load_rows, store_rows
from ...runtime.launch import Heads, accumulator_dtype, strided, triton_dtype
from ...runtime.plans import enqueue
from .. import configs
from .forward import merge
from .prepare import prepare
from .primitives import (
    LOG2_E,
    Centers,
    Weights,
    clamp,
    inside,
    piece,
    pieces,
    queries,
    window_bias,
    windows,
)


@triton.jit
def _descend(
    q, do, lse, delta, dq, dbias, key, value, key_ptr, value_ptr, cell, end, bias, top, left, width, window, scale_log2,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from `cell` on. CAREFUL: a window may touch it, and it may reach beyond `end`."""
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = cell + offs_n < end  # [BLOCK_N]
    skipped = tl.cast(cell, tl.int64)
    k = load_rows(key, key_ptr + skipped * key.row, offs_n, mask_n, CAREFUL, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D], as v
    v = load_rows(value, value_ptr + skipped * value.row, offs_n, mask_n, CAREFUL, DIM, BLOCK_D)
    # [BLOCK_M, BLOCK_N], as near, p, dp and ds
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
    if CAREFUL:
        near = inside((cell + offs_n)[None, :], width, top[:, None], left[:, None], window) & mask_n[None, :]
        scores = tl.where(mask_n[None, :], scores + tl.where(near, bias[:, None], 0.0), float("-inf"))
    p = tl.exp2(scores - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC_DTYPE)
    ds = p * (dp - delta[:, None])
    if CAREFUL:
        dbias += tl.sum(tl.where(near, ds, 0.0), axis=1)
    dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return dq, dbias


@triton.jit
def window_bias_attention_backward_query(
    grad, query, key, value, centers, weights, bias_scale_ptr, order_ptr, lse_ptr, delta_ptr, partial, dbias_ptr, maps,
    scale: tl.float64, min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    batch, length, heads, split,
    MAPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, BLOCK_M)
    number = tl.program_id(0) // tiles // heads // batch
    b = tl.program_id(0) // tiles // heads % batch
    head = tl.program_id(0) // tiles % heads
    m, start, begin, end, height, width, window = piece(number, split, maps, MAPS)
    # [BLOCK_M], as top, left, bias, lse, delta and dbias
    offs_i, mask_m = queries(order_ptr, b, m, tl.program_id(0) % tiles * BLOCK_M, length, MAPS, BLOCK_M)
    top, left, first_near, end_near = windows(centers, b, offs_i, mask_m, m, height, width, window)
    bias = window_bias(weights, bias_scale_ptr, b, offs_i, mask_m, m, min_scale, max_scale, max_bias, ACC_DTYPE)
    q = load_rows(query, head_of(query, b, head), offs_i, mask_m, True, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D], as do, dq
    do = load_rows(grad, head_of(grad, b, head), offs_i, mask_m, True, DIM, BLOCK_D)
    row = (b * heads + head).to(tl.int64) * length + offs_i
    lse = tl.load(lse_ptr + row, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
    key_ptr = head_of(key, b, head) + tl.cast(start, tl.int64) * key.row
    value_ptr = head_of(value, b, head) + tl.cast(start, tl.int64) * value.row
    scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E

    full_end = begin + (end - begin) // BLOCK_N * BLOCK_N
    first_near = tl.minimum(tl.maximum(first_near // BLOCK_N * BLOCK_N, begin), full_end)
    end_near = tl.minimum(tl.maximum(tl.cdiv(end_near, BLOCK_N) * BLOCK_N, first_near), full_end)
    near = end_near - first_near
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC_DTYPE)
    dbias = tl.zeros([BLOCK_M], ACC_DTYPE)
    for cell in range(begin, full_end - near, BLOCK_N):
        dq, dbias = _descend(
            q, do, lse, delta, dq, dbias, key, value, key_ptr, value_ptr,
            tl.where(cell < first_near, cell, cell + near),
            end, bias, top, left, width, window, scale_log2, False, PRECISION, DIM, BLOCK_D, BLOCK_N, ACC_DTYPE,
        )  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else BLOCK_N  # as in the forward pass
    for cell in range(first_near, end_near + end - full_end, HALF):
        dq, dbias = _descend(
            q, do, lse, delta, dq, dbias, key, value, key_ptr, value_ptr,
            tl.where(cell < end_near, cell, cell - end_near + full_end),
            end, bias, top, left, width, window, scale_log2, True, PRECISION, DIM, BLOCK_D, HALF, ACC_DTYPE,
        )  # fmt: skip

    b += number * batch
    dq *= tl.full([], scale, ACC_DTYPE)
    store_rows(partial, head_of(partial, b, head), offs_i, dq, mask_m, DIM, BLOCK_D)
    tl.store(dbias_ptr + (b * heads + head).to(tl.int64) * length + offs_i, dbias, mask=mask_m)


@triton.jit
def window_bias_attention_backward_key(
    ordered, key, value, dkey, dvalue, maps, scale: tl.float64, tiles, heads, key_tiles,
    MAPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // key_tiles // heads
    head = tl.program_id(0) // key_tiles % heads
    m, start, begin, end, _, width, window = piece(tl.program_id(0) % key_tiles, BLOCK_N, maps, MAPS)
    offs_n = begin + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < end  # [BLOCK_N]
    offs_j = start.to(tl.int64) + offs_n
    k = load_rows(key, head_of(key, b, head), offs_j, mask_n, True, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D], as v, dk, dv
    v = load_rows(value, head_of(value, b, head), offs_j, mask_n, True, DIM, BLOCK_D)
    scale_log2 = tl.full([], scale, ACC_DTYPE) * LOG2_E

    of_map = (b * MAPS + m).to(tl.int64)
    of_head = of_map * heads + head
    offs_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs = offs_m[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [BLOCK_M, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC_DTYPE)
    for tile in range(tiles):
        rows = (of_head * tiles + tile) * BLOCK_M
        q = tl.load(ordered.query + rows * BLOCK_D + offs)  # [BLOCK_M, BLOCK_D], as do
        do = tl.load(ordered.grad + rows * BLOCK_D + offs)
        lse = tl.load(ordered.lse + rows + offs_m)  # [BLOCK_M], as delta, top, left and bias
        delta = tl.load(ordered.delta + rows + offs_m)
        # [BLOCK_N, BLOCK_M], as near, p, dp and ds
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale_log2
        near_ptr = ordered.near + (of_map * tiles + tile) * 2
        if (begin < tl.load(near_ptr + 1)) & (end > tl.load(near_ptr)):
            rows = (of_map * tiles + tile) * BLOCK_M
            top, left = tl.load(ordered.top + rows + offs_m), tl.load(ordered.left + rows + offs_m)
            near = inside(offs_n[:, None], width, top[None, :], left[None, :], window)
            scores += tl.where(near, tl.load(ordered.bias + rows + offs_m)[None, :], 0.0)
        p = tl.exp2(scores - lse[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    dk *= tl.full([], scale, ACC_DTYPE)
    store_rows(dkey, head_of(dkey, b, head), offs_j, dk, mask_n, DIM, BLOCK_D)
    store_rows(dvalue, head_of(dvalue, b, head), offs_j, dv, mask_n, DIM, BLOCK_D)


@triton.jit
def window_bias_attention_reduce_bias(
    dbias_ptr, weights, bias_scale_ptr, dweights, dscale_ptr, maps,
    min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    batch, length, heads, split,
    MAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of the weights of one map, and each program's share of the scale's, from the bias's of each piece and
    head."""
    m = tl.program_id(0) % MAPS
    tiles = tl.cdiv(length, BLOCK_M)
    b = tl.program_id(0) // MAPS // tiles
    offs_i = (tl.program_id(0) // MAPS % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    offs_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    mask_m = offs_i < length
    mask = (offs_h < heads)[:, None] & mask_m[None, :]  # [BLOCK_H, BLOCK_M], as offs and total
    first, end, next_piece = 0, 0, 0
    for each in tl.static_range(MAPS):
        first = tl.where(m == each, next_piece, first)
        next_piece += tl.cdiv(maps[3 * each] * maps[3 * each + 1], split)
        end = tl.where(m == each, next_piece, end)
    total = tl.zeros([BLOCK_H, BLOCK_M], ACC_DTYPE)
    for number in range(first, end):
        offs = ((number * batch + b) * heads + offs_h).to(tl.int64)[:, None] * length + offs_i[None, :]
        total += tl.load(dbias_ptr + offs, mask=mask, other=0.0)
    dbias = tl.sum(total, axis=0)  # [BLOCK_M], as weight and dscale
    low, high = tl.full([], min_scale, ACC_DTYPE), tl.full([], max_scale, ACC_DTYPE)
    raw = tl.load(bias_scale_ptr).to(ACC_DTYPE)
    s = clamp(raw, low, high)
    weight_ptr = weights.ptr + b.to(tl.int64) * weights.batch + offs_i * weights.query + m * weights.map
    weight = tl.load(weight_ptr, mask=mask_m, other=0.0).to(ACC_DTYPE)
    dbias = tl.where(tl.abs(s * weight) <= tl.full([], max_bias, ACC_DTYPE), dbias, 0.0)
    dweight_ptr = dweights.ptr + b.to(tl.int64) * dweights.batch + offs_i * dweights.query + m * dweights.map
    tl.store(dweight_ptr, dbias * s, mask=mask_m)
    dscale = tl.sum(tl.where(dbias != 0, dbias * weight, 0.0), axis=0)
    tl.store(dscale_ptr + tl.program_id(0), tl.where((raw >= low) & (raw <= high), dscale, 0.0))


def launch_backward(
    grad, out, lse, order, query, key, value, centers, weights, bias_scale,
    maps, min_scale, max_scale, max_bias, scale, needs_grad,
):  # fmt: skip
    inputs = (query, key, value, weights, bias_scale)
    if query.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
    dtype = accumulator_dtype(query.dtype)
    architecture, dim = launch.architecture(query.device), query.shape[-1]
    meta = dict(MAPS=len(maps) // 3, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), ACC_DTYPE=triton_dtype(dtype))
    wants_keys = any(needs_grad[1:3])
    key_config = configs.backward_key(architecture, query.element_size(), dim)
    limits = (min_scale, max_scale, max_bias)
    tokens = [strided(Heads, t) for t in (grad, query, key, value)]
    geometry = (strided(Centers, centers), strided(Weights, weights), bias_scale, order, lse)
    delta, ordered = prepare(*tokens[:2], out, geometry, maps, limits, wants_keys, key_config["BLOCK_M"], meta)
    meta["PRECISION"] = dot_precision(query.dtype, query.device)
    dquery = dkey = dvalue = dweights = dscale = None
    if needs_grad[0] or any(needs_grad[3:]):
        config = configs.backward_query(architecture, query.element_size(), dim)
        tensors = (*tokens, *geometry, delta)
        dquery, dbias, split = _query_side(tensors, query, key, maps, (scale, *limits), dtype, config, meta)
        if any(needs_grad[3:]):
            dweights, dscale = _bias_side(dbias, split, weights, bias_scale, query, maps, limits, dtype)
    if wants_keys:
        dkey, dvalue = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
        batch, _, heads, _ = query.shape
        key_tiles = sum(pieces(maps, key_config["BLOCK_N"]))
        enqueue(
            window_bias_attention_backward_key, key_tiles * heads * batch,
            ordered, *(strided(Heads, t) for t in (key, value, dkey, dvalue)), tuple(maps), scale,
            ordered.near.shape[2], heads, key_tiles, **meta, **key_config,
        )  # fmt: skip
    return dquery, dkey, dvalue, dweights, dscale


def _query_side(tensors, query, key, maps, limits, dtype, config, meta):
    """Gradient of the queries, and of the bias for each piece of the keys."""
    batch, length, heads, _ = query.shape
    tiles = triton.cdiv(length, config["BLOCK_M"])
    split = configs.split(launch.architecture(query.device), tiles * batch * heads, key.shape[1], config["BLOCK_N"])
    splits = sum(pieces(maps, split))
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partial = dquery
    if splits > 1:
        partial = torch.empty((splits * batch, *query.shape[1:]), dtype=dtype, device=query.device)
    dbias = torch.empty((splits * batch, heads, length), dtype=dtype, device=query.device)
    enqueue(
        window_bias_attention_backward_query, tiles * heads * batch * splits,
        *tensors, strided(Heads, partial), dbias, tuple(maps), *limits, batch, length, heads, split, **meta, **config,
    )  # fmt: skip
    if splits > 1:
        merge(partial, None, dquery, None)
    return dquery, dbias, split


def _bias_side(dbias, split, weights, bias_scale, query, maps, limits, dtype):
    batch, length, heads, _ = query.shape
    block_m = 32
    programs = triton.cdiv(length, block_m) * batch * (len(maps) // 3)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    dscale = torch.empty(programs, dtype=dtype, device=weights.device)
    enqueue(
        window_bias_attention_reduce_bias, programs,
        dbias, strided(Weights, weights), bias_scale, strided(Weights, dweights), dscale, tuple(maps), *limits,
        batch, length, heads, split,
        MAPS=len(maps) // 3, BLOCK_M=block_m, BLOCK_H=triton.next_power_of_2(heads), ACC_DTYPE=triton_dtype(dtype),
        num_warps=4,
    )  # fmt: skip
    return dweights, dscale.sum().to(bias_scale.dtype)
