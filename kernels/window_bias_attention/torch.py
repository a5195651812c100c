"""The fast plain PyTorch backend, its gradients written by hand: some rows of a map at a time.

A window touches few chunks of the keys, and where queries stand by their row on the map, those whose windows touch a
chunk are a slice. They attend to it with their bias, in blocks. For all others the chunk is plain attention; on the CPU
PyTorch's flash kernel does it, the faster for having no mask to read. They are a slice too: behind the last query stand
the first ones again.

Forward joins what was attended to by the logarithms of the sums. Backward needs no joining: the final output and sum
are right for every chunk alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..runtime.launch import accumulator_dtype
from .order import query_order

CHUNK = 1024  # keys
BLOCK = 5 << 18  # scores of all heads

# MKL's exp and log set themselves up at their first call. Where two threads share that call, one may compute its half
# to four digits only, and no later call gives the same bits.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype).exp().log()

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Chunk(NamedTuple):
    """Rows of a map, from the first up to the second of `rows`, and which keys they are."""

    keys: slice
    rows: tuple[int, int]
    width: int
    window: int


def chunks(maps, cells):
    """Of every map its chunks of about as many cells, whole rows."""
    start, found = 0, []
    for height, width, window in zip(maps[::3], maps[1::3], maps[2::3]):
        step, of_map = max(1, cells // width), []
        for top in range(0, height, step):
            bottom = min(height, top + step)
            of_map.append(Chunk(slice(start + top * width, start + bottom * width), (top, bottom), width, window))
        found.append(of_map)
        start += height * width
    return found


class Windows(NamedTuple):
    """Of n windows that touch a chunk: cells of the chunk, (n, cells), of which those inside count."""

    cells: torch.Tensor
    inside: torch.Tensor

    def bias(self, values, keys):
        """Each window's of `values`, (n,), in the window, and zeros: (n, keys)."""
        bias = torch.where(self.inside, values[:, None], 0)
        return values.new_zeros(len(values), keys).scatter_(1, self.cells, bias)

    def sum(self, scores):
        """(n,) over the heads and the window."""
        in_window = scores.gather(2, self.cells.expand(len(scores), -1, -1)).sum(0)
        return torch.where(self.inside, in_window, 0).sum(-1)


def first_cells(centers, window):
    """The first (x, y) of each window, in floating point; infinity, which touches nothing, for NaN."""
    return (torch.floor(centers + 0.5) - window // 2).nan_to_num_(torch.inf, torch.inf, -torch.inf)


def touches(first, chunk):
    """Which windows touch the chunk; `first` is (n, 2), see `first_cells`."""
    left, top = first.unbind(-1)
    across = (left < chunk.width) & (left + chunk.window > 0)
    return across & (top < chunk.rows[1]) & (top + chunk.window > chunk.rows[0])


def windows_on(first, chunk):
    """The windows from `first`, (n, 2), on, as far as they are on the chunk."""
    left, top = first.unbind(-1)
    x, x_inside = _cells(left, 0, chunk.width, chunk.window)
    y, y_inside = _cells(top, *chunk.rows, chunk.window)
    cells = (y[:, :, None] - chunk.rows[0]) * chunk.width + x[:, None]
    inside = y_inside[:, :, None] & x_inside[:, None]
    return Windows(cells.flatten(1), inside.flatten(1))


def _cells(first, begin, end, window):
    """For each window from `first` on: as many cells in begin … end as can lie in one, and which of them do."""
    start = first.clamp(begin, max(begin, end - window))
    cells = start[:, None] + torch.arange(min(window, end - begin), device=first.device)
    return cells.long(), (cells >= first[:, None]) & (cells < first[:, None] + window)


def _has_flash(tensor):
    return tensor.device.type == "cpu"


class _Map:
    """A map's chunks, and the queries by their row on it, for one element of the batch. Those that stand before some
    chunk's stand behind the last one again, so the queries that do not touch a chunk are a slice."""

    def __init__(self, chunks, centers, order, values):
        self.chunks, self.place = chunks, order.argsort()
        first = first_cells(centers.index_select(0, order), chunks[0].window)
        begin, end = first.new_tensor([chunk.rows for chunk in chunks]).T.contiguous()
        top = first[:, 1].contiguous()
        begin = torch.searchsorted(top, begin - chunks[0].window, right=True)  # queries whose windows end before it
        self.touching = torch.stack([begin, torch.searchsorted(top, end)], dim=1).tolist()
        self.order = torch.cat([order, order[: self.touching[-1][0]]])
        self.first, self.values = first, values.index_select(0, order)

    def take(self, *tensors):
        """Tensors (Lq, …) of the queries as they stand, with those that stand twice."""
        return (tensor.index_select(0, self.order) for tensor in tensors)

    def walk(self, key, value, dtype):
        """Every chunk: which keys, their rows of `key` and `value`, (heads, keys, dim), and the queries in blocks: a
        slice of them, and their windows, or None where these do not touch the chunk."""
        count = len(self.place)
        # The flash kernel takes it for granted that the channels of a row lie side by side.
        for chunk, (begin, end) in zip(self.chunks, self.touching):
            k, v = (tensor[chunk.keys].to(dtype).contiguous().transpose(0, 1) for tensor in (key, value))
            size = max(1, BLOCK // (k.shape[0] * k.shape[1]))
            others = _split(end, count + begin, count if _has_flash(k) else size)
            blocks = [(block, windows_on(self.first[block], chunk)) for block in _split(begin, end, size)]
            yield chunk.keys, k, v, [(block, None) for block in others] + blocks


def _split(begin, end, size):
    return [slice(first, min(end, first + size)) for first in range(begin, end, size)]


def _maps(maps, centers, order, values):
    """Of one element of the batch."""
    return (_Map(of_map, centers[:, m], order[m], values[:, m]) for m, of_map in enumerate(chunks(maps, CHUNK)))


def _unclamped(weights, bias_scale, min_scale, max_scale, dtype):
    weights, s = weights.to(dtype), bias_scale.to(dtype).clamp(min_scale, max_scale)
    return weights, s, s * weights


def forward(
    query, key, value, centers, weights, bias_scale, maps, min_scale, max_scale, max_bias, scale
):  # fmt: skip
    dtype, order = accumulator_dtype(query.dtype), query_order(centers)
    q = query.to(dtype)
    read = _Read.nothing(q)
    values = _unclamped(weights, bias_scale, min_scale, max_scale, dtype)[2].clamp(-max_bias, max_bias)
    for b in range(len(q)) if q.numel() else ():
        for of_map in _maps(maps, centers[b], order[b], values[b]):
            read[b].join(_read_map(of_map, q[b], key[b], value[b], scale))
    out, lse = read.finish()
    return out.to(query.dtype), lse.transpose(1, 2).contiguous(), order


@dataclass(frozen=True, eq=False)
class _Read:
    """What queries have read so far, (…, heads, dim): the values, weighted by exp(score − largest), and the sum of
    these weights, for `largest` (…, heads)."""

    values: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def nothing(cls, q):
        """What queries have read of no key: whatever joins it outweighs it wholly."""
        sums = q.new_zeros(q.shape[:-1])
        return cls(torch.zeros_like(q), sums, torch.full_like(sums, torch.finfo(q.dtype).min))

    def __getitem__(self, rows):
        return _Read(self.values[rows], self.total[rows], self.largest[rows])

    def take(self, places):
        return _Read(*(tensor.index_select(0, places) for tensor in (self.values, self.total, self.largest)))

    def join(self, more):
        """Adds, in place, what was read of other keys."""
        largest = torch.maximum(self.largest, more.largest)
        kept, share = (self.largest - largest).exp_(), (more.largest - largest).exp_()
        self.values.mul_(kept[..., None]).addcmul_(more.values, share[..., None])
        self.total.mul_(kept).addcmul_(more.total, share)
        self.largest.copy_(largest)

    def finish(self):
        """The mean of the values, and the logarithm of the sum."""
        return self.values / self.total[..., None], self.largest + self.total.log()


def _read_map(of_map, q, key, value, scale):
    """What the queries (Lq, heads, dim) read on a map."""
    (rows,) = of_map.take(q)
    read, one = _Read.nothing(rows), q.new_ones(())
    for _, k, v, blocks in of_map.walk(key, value, q.dtype):
        for block, windows in blocks:
            bias = None if windows is None else windows.bias(of_map.values[block], k.shape[1])
            out, lse = _attend(rows[block].transpose(0, 1), k, v, bias, scale)
            read[block].join(_Read(out.transpose(0, 1), one, lse.T))
    again = read[len(q) :]
    read[: len(again.total)].join(again)
    return read.take(of_map.place)


def _scores(q, k, bias):
    scores = torch.bmm(q, k.mT)
    return scores if bias is None else scores.add_(bias)


def _attend(q, k, v, bias, scale):
    """What is attended to, (heads, n, dim), and the logarithm of the sum, (heads, n)."""
    if _has_flash(q):
        attended = _flash(q[None], k[None], v[None], attn_mask=None if bias is None else bias[None, None], scale=scale)
        return attended[0][0], attended[1][0]
    scores = _scores(q * scale, k, bias)
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
        for m, of_map in enumerate(_maps(maps, centers[b], order[b], values[b])):
            inputs = (g[b], q[b], out[b], lse[b].T, key[b], value[b])
            _backward_map(of_map, *inputs, scale, dq[b], dkey[b], dvalue[b], dvalues[b, :, m])
    passes = unclamped.abs() <= max_bias
    dweights = torch.where(passes, dvalues * s, 0).to(weights.dtype)
    within = (bias_scale >= min_scale) & (bias_scale <= max_scale)
    dscale = torch.where(within, torch.where(passes, dvalues * wide, 0).sum(), 0).to(bias_scale.dtype)
    return dq.to(query.dtype), dkey, dvalue, dweights, dscale


def _backward_map(of_map, g, q, out, lse, key, value, scale, dq, dkey, dvalue, dvalues):
    """Adds to the last four what comes from a map: as q, key, value (length, heads, dim), and (Lq,)."""
    rows = tuple(of_map.take(g, q, out, lse))
    part, in_windows = torch.zeros_like(rows[1]), torch.zeros_like(of_map.values)
    for keys, k, v, blocks in of_map.walk(key, value, q.dtype):
        grads = None
        for block, windows in blocks:
            some = [tensor[block].transpose(0, 1) for tensor in rows]
            if windows is None and _has_flash(q):
                dq_rows, *grads = _flash_gradients(*some, k, v, scale)
            else:
                grads = grads or [torch.zeros_like(tensor) for tensor in (k, v)]
                bias = None if windows is None else windows.bias(of_map.values[block], k.shape[1])
                dq_rows, ds = _plain_into(*grads, *some, k, v, bias, scale)
                if windows is not None:
                    in_windows[block] += windows.sum(ds)
            part[block] += dq_rows.transpose(0, 1)
        dkey[keys], dvalue[keys] = (tensor.transpose(0, 1) for tensor in grads)
    again = part[len(q) :]
    part[: len(again)] += again
    dq += part.index_select(0, of_map.place)
    dvalues += in_windows.index_select(0, of_map.place)


def _flash_gradients(g, q, out, lse, k, v, scale):
    """Of q, k and v."""
    saved = (tensor[None] for tensor in (g, q, k, v, out, lse))
    return [gradient[0] for gradient in _flash_backward(*saved, 0.0, False, scale=scale)]


def _plain_into(dk, dv, g, q, out, lse, k, v, bias, scale):
    """Adds to `dk` and `dv`; the gradients of q and of the scores."""
    q = q * scale
    p = _scores(q, k, bias).sub_(lse[..., None]).exp_()
    dv += torch.bmm(p.mT, g)
    ds = torch.bmm(g, v.mT).sub_((g * out).sum(-1, keepdim=True)).mul_(p)
    dk += torch.bmm(ds.mT, q)
    return torch.bmm(ds, k).mul_(scale), ds
