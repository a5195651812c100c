"""Plain PyTorch backend: only pairs of a query and a token in its windows are looked at, one head at a time.

A query is a bag of tokens, and a token a bag of queries, so every product of the pairs with a table of rows is a sum of
weighted bags: no row is ever gathered. Tokens are taken in chunks that a cache holds. A stable sort by query gives the
softmax, one by token the gradients of key and value. No sum depends on threads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime.launch import accumulator_dtype
from ..window_bias_attention.torch import chunks, first_cells, touches, windows_on

CHUNK = 4096  # tokens at a time, whose rows a cache holds


class _Pairs(NamedTuple):
    """n pairs, those of a query one after another."""

    query: torch.Tensor  # (n,) int32, ascending
    key: torch.Tensor  # (n,) int32
    starts: torch.Tensor  # (Lq + 1,) int64, where each query's begin, and the end
    chunks: list[tuple[slice, torch.Tensor, torch.Tensor]]  # tokens; of their pairs the queries, and places among them
    order: torch.Tensor  # (n,) int64, the pairs' places in the chunks after each other


def _pairs(centers, maps):
    """The pairs for `centers` (Lq, maps, 2)."""
    found = []
    for m, of_map in enumerate(chunks(maps, CHUNK)):
        first = first_cells(centers[:, m], of_map[0].window)
        for chunk in of_map:
            queries = touches(first, chunk).nonzero()[:, 0]
            windows = windows_on(first[queries], chunk)
            queries = queries.int()[:, None].expand_as(windows.cells)[windows.inside]
            found.append((chunk.keys, queries, windows.cells[windows.inside].int()))
    query, order = torch.cat([queries for _, queries, _ in found]).sort(stable=True)
    key = torch.cat([places + tokens.start for tokens, _, places in found])[order]
    return _Pairs(query, key, _starts(query, len(centers)), found, order)


def _starts(numbers, count):
    """(count + 1,): where each of the first `count` numbers begins among sorted ones, and the end."""
    return torch.searchsorted(numbers, torch.arange(count + 1, dtype=numbers.dtype, device=numbers.device))


def _dots(rows, others, pairs, dtype):
    """(n,): the products of the pairs' rows, of queries (Lq, dim) and of tokens (Lk, dim)."""
    rows, dots = rows.to(dtype).contiguous(), []
    for tokens, queries, places in pairs.chunks:
        table, none = others[tokens].to(dtype).contiguous(), queries.new_empty(0)
        dots.append(torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table, places, none, queries, 0))
    return torch.cat(dots)[pairs.order]


def _sum_tokens(rows, pairs, shares):
    """(Lq, dim): of each query the rows (Lk, dim) of its tokens, weighted, chunk after chunk."""
    by_chunk = torch.empty_like(shares)
    by_chunk[pairs.order] = shares
    total = shares.new_zeros(len(pairs.starts) - 1, rows.shape[1])
    parts = by_chunk.split([len(queries) for _, queries, _ in pairs.chunks])
    for (tokens, queries, places), part in zip(pairs.chunks, parts):
        total += _bags(places, _starts(queries, len(total)), rows[tokens], part)
    return total


def _sum_queries(out, rows, readers, starts, shares):
    """Into `out` (Lk, dim): of each token the rows (Lq, dim) of the queries that read it, weighted, in their order."""
    for first in range(0, len(out), CHUNK):
        some = starts[first : first + CHUNK + 1]
        inside = slice(int(some[0]), int(some[-1]))
        out[first : first + CHUNK] = _bags(readers[inside], some - some[0], rows, shares[inside])


def _bags(index, starts, rows, shares):
    """(bags, dim): each bag's rows, weighted and summed in their order."""
    table, starts = rows.to(shares.dtype).contiguous(), starts[:-1].int()
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=shares)


def forward(query, key, value, centers, maps, scale):
    batch, length, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.zeros((batch, heads, length), dtype=dtype, device=query.device)
    for b in range(batch if query.numel() else 0):
        pairs = _pairs(centers[b], maps)
        if len(pairs.key) == 0:
            continue
        for h in range(heads):
            scores = _dots(query[b, :, h], key[b, :, h], pairs, dtype).mul_(scale)
            largest = torch.segment_reduce(scores, "max", offsets=pairs.starts, unsafe=True)  # (Lq,), −inf for none
            shares = scores.sub_(largest[pairs.query]).exp_()
            total = torch.segment_reduce(shares, "sum", offsets=pairs.starts, unsafe=True)
            shares /= total[pairs.query]
            out[b, :, h] = _sum_tokens(value[b, :, h], pairs, shares)
            lse[b, h] = largest + total.log()
    return out, lse


def backward(grad, out, lse, query, key, value, centers, maps, scale, needs_grad):
    dtype = accumulator_dtype(query.dtype)
    dquery, dkey, dvalue = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    for b in range(len(query) if query.numel() else 0):
        pairs = _pairs(centers[b], maps)
        if len(pairs.key) == 0:
            continue
        token, order = pairs.key.sort(stable=True)
        starts, reader = _starts(token, key.shape[1]), pairs.query[order]
        del token
        for h in range(query.shape[2]):
            g, q, k, v = (tensor[b, :, h] for tensor in (grad, query, key, value))
            shares = _dots(q, k, pairs, dtype)
            shares = shares.mul_(scale).sub_(lse[b, h, pairs.query]).exp_()
            if needs_grad[2]:
                _sum_queries(dvalue[b, :, h], g, reader, starts, shares[order])
            if needs_grad[0] or needs_grad[1]:
                delta = (g.to(dtype) * out[b, :, h].to(dtype)).sum(-1)
                ds = _dots(g, v, pairs, dtype)
                ds = ds.sub_(delta[pairs.query]).mul_(shares).mul_(scale)
                dquery[b, :, h] = _sum_tokens(k, pairs, ds)
                _sum_queries(dkey[b, :, h], q, reader, starts, ds[order])
    return dquery, dkey, dvalue
