"""The fast plain PyTorch backend, its gradients written by hand: some rows of a map at a time.

A window touches few chunks of the keys. The queries whose window touches a chunk attend to it with their bias, in
blocks, scores and all. For all others the chunk is plain attention; on the CPU PyTorch's flash kernel does it, the
faster for having no mask to read. Forward joins the chunks by the logarithms of their sums. Backward needs no joining:
the final output and sum are right for every chunk alone.
"""

from typing import NamedTuple

import torch

from ..runtime.launch import accumulator_dtype
from .order import query_order

CHUNK = 1024  # keys
BLOCK = 1 << 20  # scores of all heads

# MKL's exp and log set themselves up at their first call. Where two threads share that call, one may compute its half
# to four digits only, and no later call gives the same bits.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype).exp().log()

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Chunk(NamedTuple):
    """Rows of a map, from the first up to the second of `rows`, and which keys they are."""

    map: int
    keys: slice
    rows: tuple[int, int]
    width: int
    window: int


def chunks(maps, cells):
    """The maps in chunks of about as many cells, whole rows."""
    start = 0
    for m, (height, width, window) in enumerate(zip(maps[::3], maps[1::3], maps[2::3])):
        step = max(1, cells // width)
        for top in range(0, height, step):
            bottom = min(height, top + step)
            yield Chunk(m, slice(start + top * width, start + bottom * width), (top, bottom), width, window)
        start += height * width


class Windows(NamedTuple):
    """The windows that touch a chunk: whose, (n,), and cells of the chunk, (n, cells), of which those inside count."""

    queries: torch.Tensor
    cells: torch.Tensor
    inside: torch.Tensor

    def add_bias(self, scores, values):
        """Each query's of `values`, (n,), to its scores in the window, of (heads, n, keys)."""
        cells = self.cells.expand(len(scores), -1, -1)
        bias = torch.where(self.inside, values[:, None], 0)
        scores.scatter_(2, cells, scores.gather(2, cells) + bias)

    def sum(self, scores):
        """(n,) over the heads and the window."""
        in_window = scores.gather(2, self.cells.expand(len(scores), -1, -1)).sum(0)
        return torch.where(self.inside, in_window, 0).sum(-1)

    def split(self, size):
        return map(Windows, *(tensor.split(size) for tensor in self))


def windows_on(centers, chunk):
    """The windows round `centers`, (Lq, 2), that touch the chunk, and the numbers of all other queries."""
    left, top = (torch.floor(centers + 0.5) - chunk.window // 2).unbind(-1)
    touches = _touch(left, 0, chunk.width, chunk.window) & _touch(top, *chunk.rows, chunk.window)
    queries, others = (which.nonzero()[:, 0] for which in (touches, ~touches))
    x, x_inside = _cells(left[queries], 0, chunk.width, chunk.window)
    y, y_inside = _cells(top[queries], *chunk.rows, chunk.window)
    cells = (y[:, :, None] - chunk.rows[0]) * chunk.width + x[:, None]
    inside = y_inside[:, :, None] & x_inside[:, None]
    return Windows(queries, cells.flatten(1), inside.flatten(1)), others


def _touch(first, begin, end, window):
    """In floating point: NaN and infinity touch nothing."""
    return (first < end) & (first + window > begin)


def _cells(first, begin, end, window):
    """For each window from `first` on: as many cells in begin … end as can lie in one, and which of them do."""
    start = first.clamp(begin, max(begin, end - window))
    cells = start[:, None] + torch.arange(min(window, end - begin), device=first.device)
    return cells.long(), (cells >= first[:, None]) & (cells < first[:, None] + window)


def _has_flash(tensor):
    return tensor.device.type == "cpu"


def _walk(key, value, centers, maps, dtype):
    """Every chunk, its keys and values (heads, keys, dim), and the queries that attend to it together, in blocks.

    A block is the numbers of its queries and their windows, or None where these do not touch the chunk.
    """
    for chunk in chunks(maps, CHUNK):
        k, v = (tensor[chunk.keys].to(dtype).transpose(0, 1).contiguous() for tensor in (key, value))
        windows, others = windows_on(centers[:, chunk.map], chunk)
        size = max(1, BLOCK // (k.shape[0] * k.shape[1]))
        blocks = [(queries, None) for queries in others.split(max(1, len(others)) if _has_flash(k) else size)]
        blocks += [(block.queries, block) for block in windows.split(size)]
        yield chunk, k, v, [block for block in blocks if len(block[0])]


def _rows(tensor, queries):
    """(heads, n, dim) from (Lq, heads, dim)."""
    return tensor.index_select(0, queries).transpose(0, 1)


def _unclamped(weights, bias_scale, min_scale, max_scale, dtype):
    weights, s = weights.to(dtype), bias_scale.to(dtype).clamp(min_scale, max_scale)
    return weights, s, s * weights


def forward(
    query, key, value, centers, weights, bias_scale, maps, min_scale, max_scale, max_bias, scale
):  # fmt: skip
    dtype = accumulator_dtype(query.dtype)
    q = query.to(dtype)
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    values = _unclamped(weights, bias_scale, min_scale, max_scale, dtype)[2].clamp(-max_bias, max_bias)
    for b in range(len(q)) if q.numel() else ():
        _forward_one(q[b], key[b], value[b], centers[b], values[b], maps, scale, out[b], lse[b])
    return out.to(query.dtype), lse, query_order(centers)


def _forward_one(q, key, value, centers, values, maps, scale, out, lse):
    """Fills zeros, `out` (Lq, heads, dim) and `lse` (heads, Lq), for one element of the batch."""
    total, largest = q.new_zeros(q.shape[:2]), q.new_full(q.shape[:2], -torch.inf)
    part, part_lse = torch.empty_like(out), torch.empty_like(total)
    for chunk, k, v, blocks in _walk(key, value, centers, maps, q.dtype):
        for queries, windows in blocks:
            rows = _rows(q, queries)
            if windows is None and _has_flash(q):
                attended = [result[0] for result in _flash(rows[None], k[None], v[None], scale=scale)]
            else:
                attended = _attend(_scores(rows * scale, k, windows, values[queries, chunk.map]), v)
            for whole, result in zip((part, part_lse), attended):
                whole.index_copy_(0, queries, result.transpose(0, 1))
        previous, largest = largest, torch.maximum(largest, part_lse)
        kept, share = (previous - largest).exp_(), (part_lse - largest).exp_()
        out.mul_(kept[..., None]).addcmul_(part, share[..., None])
        total = total * kept + share
    out /= total[..., None]
    lse.copy_((largest + total.log()).T)


def _scores(q, k, windows, values):
    scores = torch.bmm(q, k.mT)
    if windows is not None:
        windows.add_bias(scores, values)
    return scores


def _attend(scores, v):
    """What is attended to, and the logarithm of the sum."""
    largest = scores.amax(-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    return torch.bmm(scores, v).div_(total), (largest + total.log())[..., 0]


def backward(
    grad, out, lse, order, query, key, value, centers, weights, bias_scale,
    maps, min_scale, max_scale, max_bias, scale, needs_grad,
):  # fmt: skip
    dtype = accumulator_dtype(query.dtype)
    g, out, q = (tensor.to(dtype) for tensor in (grad, out, query))
    wide, s, unclamped = _unclamped(weights, bias_scale, min_scale, max_scale, dtype)
    values = unclamped.clamp(-max_bias, max_bias)
    dq, dvalues = q.new_zeros(q.shape), torch.zeros_like(values)
    dkey, dvalue = (tensor.new_zeros(tensor.shape) for tensor in (key, value))
    for b in range(len(q)) if q.numel() else ():
        inputs = (g[b], q[b], out[b], lse[b], key[b], value[b], centers[b], values[b])
        _backward_one(*inputs, maps, scale, dq[b], dkey[b], dvalue[b], dvalues[b])
    passes = unclamped.abs() <= max_bias
    dweights = torch.where(passes, dvalues * s, 0).to(weights.dtype)
    within = (bias_scale >= min_scale) & (bias_scale <= max_scale)
    dscale = torch.where(within, torch.where(passes, dvalues * wide, 0).sum(), 0).to(bias_scale.dtype)
    return dq.to(query.dtype), dkey, dvalue, dweights, dscale


def _backward_one(g, q, out, lse, key, value, centers, values, maps, scale, dq, dkey, dvalue, dvalues):
    """Fills the last four, zeros, for one element of the batch: as q, key, value and `values` (Lq, maps)."""
    part = torch.empty_like(dq)
    for chunk, k, v, blocks in _walk(key, value, centers, maps, q.dtype):
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for queries, windows in blocks:
            rows = (*(_rows(tensor, queries) for tensor in (g, q, out)), lse[:, queries])
            if windows is None and _has_flash(q):
                dq_rows = _flash_into(dk, dv, *rows, k, v, scale)
            else:
                dq_rows, ds = _plain_into(dk, dv, *rows, k, v, scale, windows, values[queries, chunk.map])
            part.index_copy_(0, queries, dq_rows.transpose(0, 1))
            if windows is not None:
                dvalues[queries, chunk.map] += windows.sum(ds)
        dq += part
        dkey[chunk.keys], dvalue[chunk.keys] = dk.transpose(0, 1), dv.transpose(0, 1)


def _flash_into(dk, dv, g, q, out, lse, k, v, scale):
    """Adds to `dk` and `dv` and returns the gradient of q."""
    saved = (tensor[None] for tensor in (g, q, k, v, out, lse))
    dq, *others = _flash_backward(*saved, 0.0, False, scale=scale)
    dk += others[0][0]
    dv += others[1][0]
    return dq[0]


def _plain_into(dk, dv, g, q, out, lse, k, v, scale, windows, values):
    """The same, and the gradient of the scores."""
    q = q * scale
    p = _scores(q, k, windows, values).sub_(lse[..., None]).exp_()
    dv.baddbmm_(p.mT, g)
    ds = torch.bmm(g, v.mT).sub_((g * out).sum(-1, keepdim=True)).mul_(p)
    dk.baddbmm_(ds.mT, q)
    return torch.bmm(ds, k).mul_(scale), ds
