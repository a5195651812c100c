"""Triton backend. Forward: a program owns a row. Backward: a program owns a row of the bias and walks the rows of the
scores that share it, so the gradient of the bias is summed in a fixed order while the scores' passes by."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime.launch import accumulator_dtype, triton_dtype
from ..runtime.plans import enqueue
from . import configs


class Rows(NamedTuple):
    """(own dimensions, shared dimensions, keys): see `_Grouping`. Strides of 0 where a tensor is broadcast."""

    ptr: Any
    own: tuple[int, ...]
    shared: tuple[int, ...]
    key: int


@triton.jit
def _row(tensor, own, shared, own_sizes, shared_sizes, OWN: tl.constexpr, SHARED: tl.constexpr):
    """Pointer to the first key of a row. `own` counts the rows of the bias, `shared` those that share one."""
    row_ptr = tensor.ptr
    for d in tl.static_range(OWN):
        size = own_sizes[OWN - 1 - d]
        row_ptr += (own % size).to(tl.int64) * tensor.own[OWN - 1 - d]
        own = own // size
    for d in tl.static_range(SHARED):
        size = shared_sizes[SHARED - 1 - d]
        row_ptr += (shared % size).to(tl.int64) * tensor.shared[SHARED - 1 - d]
        shared = shared // size
    return row_ptr


@triton.jit
def _scale(bias_scale_ptr, min_scale, max_scale, ACC_DTYPE: tl.constexpr):
    """The scale before and after clamping."""
    raw = tl.load(bias_scale_ptr).to(ACC_DTYPE)
    s = tl.maximum(raw, tl.full([], min_scale, ACC_DTYPE), propagate_nan=tl.PropagateNan.ALL)
    return raw, tl.minimum(s, tl.full([], max_scale, ACC_DTYPE), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logits(scores, bias, scores_ptr, bias_ptr, offs_k, keys, s, max_bias, ACC_DTYPE: tl.constexpr):
    mask_k = offs_k < keys  # [BLOCK_K], as all below
    b = s * tl.load(bias_ptr + offs_k.to(tl.int64) * bias.key, mask=mask_k, other=0.0).to(ACC_DTYPE)
    limit = tl.full([], max_bias, ACC_DTYPE)
    b = tl.maximum(tl.minimum(b, limit, propagate_nan=tl.PropagateNan.ALL), -limit, propagate_nan=tl.PropagateNan.ALL)
    logits = tl.load(scores_ptr + offs_k.to(tl.int64) * scores.key, mask=mask_k, other=float("-inf"))
    return logits.to(ACC_DTYPE) + b


@triton.jit
def bias_softmax_forward(
    scores, bias, bias_scale_ptr, out, own_sizes, shared_sizes,
    min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    sharing, keys,
    OWN: tl.constexpr, SHARED: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) // sharing
    shared = tl.program_id(0) % sharing
    scores_ptr = _row(scores, own, shared, own_sizes, shared_sizes, OWN, SHARED)
    bias_ptr = _row(bias, own, shared, own_sizes, shared_sizes, OWN, SHARED)
    out_ptr = _row(out, own, shared, own_sizes, shared_sizes, OWN, SHARED)
    _, s = _scale(bias_scale_ptr, min_scale, max_scale, ACC_DTYPE)
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K], as all below
    if ONE_TILE:
        logits = _logits(scores, bias, scores_ptr, bias_ptr, offs_k, keys, s, max_bias, ACC_DTYPE)
        m_i = tl.max(logits, axis=0)
        # Nothing but −inf: any finite maximum makes every share 0.
        p = tl.exp(logits - tl.where(m_i == float("-inf"), 0.0, m_i))
        l_i = tl.sum(p, axis=0)
        tl.store(out_ptr + offs_k, p / tl.where(l_i == 0, 1.0, l_i), mask=offs_k < keys)
    else:
        largest = tl.full([BLOCK_K], float("-inf"), ACC_DTYPE)
        for start in range(0, keys, BLOCK_K):
            logits = _logits(scores, bias, scores_ptr, bias_ptr, start + offs_k, keys, s, max_bias, ACC_DTYPE)
            largest = tl.maximum(largest, logits)
        m_i = tl.max(largest, axis=0)
        m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
        total = tl.zeros([BLOCK_K], ACC_DTYPE)
        for start in range(0, keys, BLOCK_K):
            logits = _logits(scores, bias, scores_ptr, bias_ptr, start + offs_k, keys, s, max_bias, ACC_DTYPE)
            total += tl.exp(logits - m_i)
        l_i = tl.sum(total, axis=0)
        for start in range(0, keys, BLOCK_K):
            logits = _logits(scores, bias, scores_ptr, bias_ptr, start + offs_k, keys, s, max_bias, ACC_DTYPE)
            p = tl.exp(logits - m_i) / tl.where(l_i == 0, 1.0, l_i)
            tl.store(out_ptr + start + offs_k, p, mask=start + offs_k < keys)


@triton.jit
def bias_softmax_delta(
    grad, probabilities, delta_ptr, own_sizes, shared_sizes, sharing, keys,
    OWN: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Sum of probability · gradient over a row that is longer than a tile."""
    own = tl.program_id(0) // sharing
    shared = tl.program_id(0) % sharing
    grad_ptr = _row(grad, own, shared, own_sizes, shared_sizes, OWN, SHARED)
    p_ptr = _row(probabilities, own, shared, own_sizes, shared_sizes, OWN, SHARED)
    total = tl.zeros([BLOCK_K], ACC_DTYPE)
    for start in range(0, keys, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K], as all below
        p = tl.load(p_ptr + offs_k * probabilities.key, mask=offs_k < keys, other=0.0).to(ACC_DTYPE)
        total += p * tl.load(grad_ptr + offs_k * grad.key, mask=offs_k < keys, other=0.0).to(ACC_DTYPE)
    tl.store(delta_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def bias_softmax_backward(
    grad, probabilities, bias, bias_scale_ptr, delta_ptr, dscores, dbias_ptr, dscale_ptr, own_sizes, shared_sizes,
    min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    rows, sharing, chunk, keys,
    OWN: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_K)
    own = tl.program_id(0) // tiles % rows
    number = tl.program_id(0) // tiles // rows
    offs_k = (tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K], as all below
    mask_k = offs_k < keys
    if dbias_ptr is not None:
        bias_ptr = _row(bias, own, 0, own_sizes, shared_sizes, OWN, SHARED)
    total = tl.zeros([BLOCK_K], ACC_DTYPE)
    for shared in range(number * chunk, tl.minimum(number * chunk + chunk, sharing)):
        p_ptr = _row(probabilities, own, shared, own_sizes, shared_sizes, OWN, SHARED) + offs_k * probabilities.key
        grad_ptr = _row(grad, own, shared, own_sizes, shared_sizes, OWN, SHARED) + offs_k * grad.key
        p = tl.load(p_ptr, mask=mask_k, other=0.0).to(ACC_DTYPE)
        d = p * tl.load(grad_ptr, mask=mask_k, other=0.0).to(ACC_DTYPE)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + own.to(tl.int64) * sharing + shared)
        else:
            delta = tl.sum(d, axis=0)
        d -= p * delta
        if dscores is not None:
            dscores_ptr = _row(dscores, own, shared, own_sizes, shared_sizes, OWN, SHARED)
            tl.store(dscores_ptr + offs_k, d, mask=mask_k)
        total += d
    if dbias_ptr is not None:
        raw, s = _scale(bias_scale_ptr, min_scale, max_scale, ACC_DTYPE)
        b = tl.load(bias_ptr + offs_k * bias.key, mask=mask_k, other=0.0).to(ACC_DTYPE)
        total = tl.where(tl.abs(s * b) <= tl.full([], max_bias, ACC_DTYPE), total, 0.0)
        tl.store(dbias_ptr + (number * rows + own).to(tl.int64) * keys + offs_k, total * s, mask=mask_k)
        within = (raw >= tl.full([], min_scale, ACC_DTYPE)) & (raw <= tl.full([], max_scale, ACC_DTYPE))
        # A bias of −inf moves nothing; 0 · −inf would say NaN.
        dscale = tl.sum(tl.where(total == 0, 0.0, total * b), axis=0)
        tl.store(dscale_ptr + tl.program_id(0), tl.where(within, dscale, 0.0))


class _Grouping:
    """The rows of `shape` in two groups of dimensions: those the bias has too, and those it is broadcast over."""

    def __init__(self, shape: torch.Size, bias: torch.Tensor):
        self.shape = shape
        sizes = (1,) * (len(shape) - bias.ndim) + tuple(bias.shape)
        self.own = [d for d in range(len(shape) - 1) if sizes[d] == shape[d]]
        self.shared = [d for d in range(len(shape) - 1) if sizes[d] != shape[d]]
        self.own_sizes = tuple(shape[d] for d in self.own) or (1,)
        self.shared_sizes = tuple(shape[d] for d in self.shared) or (1,)
        self.rows, self.sharing, self.keys = math.prod(self.own_sizes), math.prod(self.shared_sizes), shape[-1]

    def strided(self, tensor: torch.Tensor | None) -> Rows | None:
        if tensor is None:
            return None
        strides = tensor.expand(self.shape).stride()
        own = tuple(strides[d] for d in self.own) or (0,)
        shared = tuple(strides[d] for d in self.shared) or (0,)
        return Rows(tensor, own, shared, strides[-1])

    @property
    def meta(self) -> dict[str, int]:
        return dict(OWN=len(self.own_sizes), SHARED=len(self.shared_sizes))


def launch_forward(scores, bias, bias_scale, min_scale, max_scale, max_bias):
    out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if out.numel():
        rows = _Grouping(scores.shape, bias)
        config = configs.forward(rows.keys)
        enqueue(
            bias_softmax_forward, rows.rows * rows.sharing,
            rows.strided(scores), rows.strided(bias), bias_scale, rows.strided(out), rows.own_sizes, rows.shared_sizes,
            min_scale, max_scale, max_bias, rows.sharing, rows.keys,
            ONE_TILE=rows.keys <= config["BLOCK_K"], ACC_DTYPE=triton_dtype(accumulator_dtype(scores.dtype)),
            **rows.meta, **config,
        )  # fmt: skip
    return out


def launch_backward(grad, probabilities, bias, bias_scale, min_scale, max_scale, max_bias, needs_grad):
    device, dtype = grad.device, accumulator_dtype(probabilities.dtype)
    inputs = (probabilities, bias, bias_scale)
    if grad.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in inputs]
    rows = _Grouping(grad.shape, bias)
    config = configs.backward(rows.keys)
    meta = dict(**rows.meta, **config, ACC_DTYPE=triton_dtype(dtype))
    tensors = (rows.strided(grad), rows.strided(probabilities))
    tiles, chunk = triton.cdiv(rows.keys, config["BLOCK_K"]), configs.chunk(rows.rows, rows.sharing)
    chunks = triton.cdiv(rows.sharing, chunk)
    delta = dscores = dbias = dscale = None
    if tiles > 1:
        delta = torch.empty(rows.rows * rows.sharing, dtype=dtype, device=device)
        enqueue(
            bias_softmax_delta, delta.numel(),
            *tensors, delta, rows.own_sizes, rows.shared_sizes, rows.sharing, rows.keys, **meta,
        )  # fmt: skip
    if needs_grad[0]:
        dscores = torch.empty(grad.shape, dtype=probabilities.dtype, device=device)
    if any(needs_grad[1:]):
        dbias = torch.empty((chunks, rows.rows, rows.keys), dtype=dtype, device=device)
        dscale = torch.empty(tiles * rows.rows * chunks, dtype=dtype, device=device)
    enqueue(
        bias_softmax_backward, tiles * rows.rows * chunks,
        *tensors, rows.strided(bias), bias_scale, delta, rows.strided(dscores), dbias, dscale,
        rows.own_sizes, rows.shared_sizes, min_scale, max_scale, max_bias,
        rows.rows, rows.sharing, chunk, rows.keys, **meta,
    )  # fmt: skip
    if dbias is not None:
        dbias = dbias.sum(0).sum_to_size(rows.rows, *bias.shape[-1:]).reshape(bias.shape).to(bias.dtype)
        dscale = dscale.sum().to(bias_scale.dtype)
    return dscores, dbias, dscale
