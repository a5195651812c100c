"""The mathematics in plain PyTorch, for any float dtype and device, some rows of a map at a time.

The keys of a chunk belong to one map, so its bias is one window a query. Chunks are joined by the logarithms of their
sums; backward needs no joining, because the final output and sum are right for every chunk alone. The bias of a chunk
is small and shared by the heads; the scores of a chunk never exist on the CPU, whose flash attention does the bulk.
Only the bias's own gradient needs some of them again: those of the queries whose window touches the chunk.
"""

from typing import NamedTuple

import torch

from .._runtime.launch import accumulator_dtype

CHUNK = 2048  # keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Chunk(NamedTuple):
    map: int
    keys: slice
    rows: tuple[int, int]
    width: int
    window: int


def _chunks(maps):
    start = 0
    for m, (height, width, window) in enumerate(zip(maps[::3], maps[1::3], maps[2::3])):
        step = max(1, CHUNK // width)
        for top in range(0, height, step):
            bottom = min(height, top + step)
            yield _Chunk(m, slice(start + top * width, start + bottom * width), (top, bottom), width, window)
        start += height * width


def _inside(centers, chunk):
    """Which rows, (B, Lq, rows), and which columns, (B, Lq, width), of the chunk lie in each query's window."""
    first = torch.floor(centers[:, :, chunk.map] + 0.5) - chunk.window // 2

    def inside(first, begin, end):  # in floating point: NaN and infinity are never inside
        offset = torch.arange(begin, end, dtype=first.dtype, device=first.device) - first[..., None]
        return (offset >= 0) & (offset < chunk.window)

    return inside(first[..., 1], *chunk.rows), inside(first[..., 0], 0, chunk.width)


def _bias(rows, columns, value):
    """(B, Lq, keys): `value` (B, Lq) in the window, 0 elsewhere."""
    in_rows = torch.where(rows, value[..., None], 0)
    return torch.where(columns[:, :, None, :], in_rows[..., None], 0).flatten(2)


def _heads_first(tensor, dtype):
    """(B, heads, length, dim), as the flash kernel wants it: the last dimension dense."""
    tensor = tensor.to(dtype).transpose(1, 2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _unclamped(weights, bias_scale, min_scale, max_scale, dtype):
    weights, s = weights.to(dtype), bias_scale.to(dtype).clamp(min_scale, max_scale)
    return weights, s, s * weights


def forward(
    query, key, value, centers, weights, bias_scale, maps, min_scale, max_scale, max_bias, scale
):  # fmt: skip
    dtype = accumulator_dtype(query.dtype)
    q = _heads_first(query, dtype)
    out, total = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    largest = torch.full_like(total, -torch.inf)
    if q.numel() == 0:
        return out.transpose(1, 2).to(query.dtype).contiguous(), total
    values = _unclamped(weights, bias_scale, min_scale, max_scale, dtype)[2].clamp(-max_bias, max_bias)
    for chunk in _chunks(maps):
        bias = _bias(*_inside(centers, chunk), values[:, :, chunk.map])
        k_chunk, v_chunk = (_heads_first(tensor[:, chunk.keys], dtype) for tensor in (key, value))
        part, part_lse = _attend(q, k_chunk, v_chunk, bias, scale)
        previous, largest = largest, torch.maximum(largest, part_lse)
        kept, share = (previous - largest).exp_(), (part_lse - largest).exp_()
        out.mul_(kept[..., None]).addcmul_(part, share[..., None])
        total = total * kept + share
    out /= total[..., None]
    return out.transpose(1, 2).to(query.dtype).contiguous(), (largest + total.log()).contiguous()


def _has_flash(tensor):
    return tensor.device.type == "cpu"


def _attend(q, k, v, bias, scale):
    """Attention to some keys, and the logarithm of its sum."""
    if _has_flash(q):
        return _flash(q, k, v, attn_mask=bias[:, None], scale=scale)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for head in range(q.shape[1]):
        scores = torch.baddbmm(bias, q[:, head], k[:, head].transpose(1, 2), alpha=scale)
        lse[:, head] = torch.logsumexp(scores, dim=-1)
        out[:, head] = scores.sub_(lse[:, head, :, None]).exp_() @ v[:, head]
    return out, lse


def backward(
    grad, out, lse, query, key, value, centers, weights, bias_scale,
    maps, min_scale, max_scale, max_bias, scale, needs_grad,
):  # fmt: skip
    dtype = accumulator_dtype(query.dtype)
    g, out, q = (_heads_first(tensor, dtype) for tensor in (grad, out, query))
    delta = (g * out).sum(-1)
    wide, s, unclamped = _unclamped(weights, bias_scale, min_scale, max_scale, dtype)
    values = unclamped.clamp(-max_bias, max_bias)
    dquery, dvalues = torch.zeros(query.shape, dtype=dtype, device=q.device), torch.zeros_like(values)
    dkey, dvalue = (torch.zeros(tensor.shape, dtype=tensor.dtype, device=q.device) for tensor in (key, value))
    needs_attention, needs_bias = any(needs_grad[:3]), any(needs_grad[3:])
    for chunk in _chunks(maps) if q.numel() else ():
        inside = _inside(centers, chunk)
        bias = _bias(*inside, values[:, :, chunk.map])
        k_chunk, v_chunk = (_heads_first(tensor[:, chunk.keys], dtype) for tensor in (key, value))
        if needs_attention:
            dq, dk, dv = _attend_backward(g, q, k_chunk, v_chunk, bias, out, lse, delta, scale)
            dquery += dq.transpose(1, 2)
            dkey[:, chunk.keys], dvalue[:, chunk.keys] = dk.transpose(1, 2), dv.transpose(1, 2)
        if needs_bias:
            dvalues[:, :, chunk.map] += _bias_gradient(g, q, k_chunk, v_chunk, bias, *inside, lse, delta, scale)
    passes = unclamped.abs() <= max_bias
    dweights = torch.where(passes, dvalues * s, 0).to(weights.dtype)
    within = (bias_scale >= min_scale) & (bias_scale <= max_scale)
    dscale = torch.where(within, torch.where(passes, dvalues * wide, 0).sum(), 0).to(bias_scale.dtype)
    computed = (dquery.to(query.dtype), dkey, dvalue, dweights, dscale)
    return [gradient for gradient, needed in zip(computed, needs_grad) if needed]


def _attend_backward(g, q, k, v, bias, out, lse, delta, scale):
    if _has_flash(q):
        return _flash_backward(g, q, k, v, out, lse, 0.0, False, attn_mask=bias[:, None], scale=scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for head in range(q.shape[1]):
        operands = (tensor[:, head] for tensor in (g, q, k, v))
        p, ds = _probabilities_and_gradient(*operands, bias, lse[:, head], delta[:, head], scale)
        dq[:, head] = ds @ k[:, head] * scale
        dk[:, head] = ds.transpose(1, 2) @ q[:, head] * scale
        dv[:, head] = p.transpose(1, 2) @ g[:, head]
    return dq, dk, dv


def _probabilities_and_gradient(g, q, k, v, bias, lse, delta, scale):
    """Of one head, (B, queries, keys): the probabilities and the gradient of the scores."""
    p = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).sub_(lse[..., None]).exp_()
    return p, torch.baddbmm(delta[..., None], g, v.transpose(1, 2), beta=-1).mul_(p)


def _bias_gradient(g, q, k, v, bias, rows, columns, lse, delta, scale):
    """(B, Lq): the gradient of the scores, summed over the heads and the window. Only queries near the chunk count."""
    near = (rows.any(-1) & columns.any(-1)).any(0).nonzero()[:, 0]
    total = torch.zeros_like(bias[:, near])
    for head in range(q.shape[1]):
        operands = (g[:, head, near], q[:, head, near], k[:, head], v[:, head])
        total += _probabilities_and_gradient(*operands, bias[:, near], lse[:, head, near], delta[:, head, near], scale)[
            1
        ]
    inside = (rows[:, near, :, None] & columns[:, near, None, :]).flatten(2)
    result = torch.zeros_like(bias[:, :, 0])
    result[:, near] = torch.where(inside, total, 0).sum(-1)
    return result
