"""Plain PyTorch backend: only pairs of a query and a token in its windows are looked at, one head at a time.

A query is a bag of tokens, and a token a bag of queries, so every product of the pairs with a table of rows is a sum of
weighted bags: no row is ever gathered. The pairs in the order of their queries give the output and the queries'
gradient; a stable sort by token gives those of key and value. No sum depends on threads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype
from ..window_bias_attention.torch import chunks, windows_on

STRIP = 32  # columns of a head that are copied at a time


class _Pairs(NamedTuple):
    """n pairs, those of a query one after another."""

    query: torch.Tensor  # (n,) int32, ascending
    key: torch.Tensor  # (n,) int32
    starts: torch.Tensor  # (Lq + 1,) int64, where each query's begin, and the end


def _pairs(centers, maps, keys):
    """The pairs for `centers` (Lq, maps, 2)."""
    queries, tokens = [], []
    for whole in chunks(maps, keys):
        windows, _ = windows_on(centers[:, whole.map], whole)
        queries.append(windows.queries.int()[:, None].expand_as(windows.cells)[windows.inside])
        tokens.append(windows.cells[windows.inside].int() + whole.keys.start)
    query, order = torch.cat(queries).sort(stable=True)
    return _Pairs(query, torch.cat(tokens)[order], _starts(query, len(centers)))


def _starts(numbers, count):
    """(count + 1,): where each of the first `count` numbers begins among sorted ones, and the end."""
    return torch.searchsorted(numbers, torch.arange(count + 1, dtype=numbers.dtype, device=numbers.device))


def _strips(rows):
    return [slice(first, first + STRIP) for first in range(0, rows.shape[1], STRIP)]


def _dense(rows, strip, dtype):
    return rows[:, strip].to(dtype).contiguous()


def _dots(rows, query, others, key, dtype):
    """(n,): the products of the pairs' rows, of (…, dim)."""
    none, total = query.new_empty(0), torch.zeros(query.shape, dtype=dtype, device=query.device)
    for strip in _strips(rows):
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            _dense(rows, strip, dtype), _dense(others, strip, dtype), key, none, query, 0
        )
    return total


def _sum_bags(out, index, starts, rows, shares):
    """Into `out` (bags, dim): each bag's rows, weighted and summed in their order."""
    starts = starts[:-1].int()
    for strip in _strips(rows):
        out[:, strip] = F.embedding_bag(
            index, _dense(rows, strip, shares.dtype), starts, mode="sum", per_sample_weights=shares
        )


def forward(query, key, value, centers, maps, scale):
    batch, length, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.zeros((batch, heads, length), dtype=dtype, device=query.device)
    for b in range(batch if query.numel() else 0):
        pairs = _pairs(centers[b], maps, key.shape[1])
        if len(pairs.key) == 0:
            continue
        for h in range(heads):
            scores = _dots(query[b, :, h], pairs.query, key[b, :, h], pairs.key, dtype).mul_(scale)
            largest = torch.segment_reduce(scores, "max", offsets=pairs.starts, unsafe=True)  # (Lq,), −inf for none
            shares = scores.sub_(largest[pairs.query]).exp_()
            total = torch.segment_reduce(shares, "sum", offsets=pairs.starts, unsafe=True)
            shares /= total[pairs.query]
            _sum_bags(out[b, :, h], pairs.key, pairs.starts, value[b, :, h], shares)
            lse[b, h] = largest + total.log()
    return out, lse


def backward(grad, out, lse, query, key, value, centers, maps, scale, needs_grad):
    dtype = accumulator_dtype(query.dtype)
    dquery, dkey, dvalue = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    for b in range(len(query) if query.numel() else 0):
        pairs = _pairs(centers[b], maps, key.shape[1])
        if len(pairs.key) == 0:
            continue
        token, order = pairs.key.sort(stable=True)
        starts, reader = _starts(token, key.shape[1]), pairs.query[order]
        del token
        for h in range(query.shape[2]):
            g, q, k, v = (tensor[b, :, h] for tensor in (grad, query, key, value))
            shares = _dots(q, pairs.query, k, pairs.key, dtype)
            shares = shares.mul_(scale).sub_(lse[b, h, pairs.query]).exp_()
            if needs_grad[2]:
                _sum_bags(dvalue[b, :, h], reader, starts, g, shares[order])
            if needs_grad[0] or needs_grad[1]:
                delta = (g.to(dtype) * out[b, :, h].to(dtype)).sum(-1)
                ds = _dots(g, pairs.query, v, pairs.key, dtype)
                ds = ds.sub_(delta[pairs.query]).mul_(shares).mul_(scale)
                _sum_bags(dquery[b, :, h], pairs.key, pairs.starts, k, ds)
                _sum_bags(dkey[b, :, h], reader, starts, q, ds[order])
    return dquery, dkey, dvalue
