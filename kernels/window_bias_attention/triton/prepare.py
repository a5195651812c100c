"""What the backward pass computes first: delta, and for the keys the queries in the order of each map."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.attention import head_of, load_rows
from ...runtime.launch import Heads, strided
from ...runtime.plans import enqueue
from .primitives import piece, queries, window_bias, windows


class Tiles(NamedTuple):
    """The queries in the order of each map, in tiles, the last one filled up; dense.

    At 900 queries, 8 heads of 32 and 7 maps they take 7 MB in bfloat16.

    query, grad: (B, maps, heads, rows, BLOCK_D). lse, delta: (B, maps, heads, rows). top, left, bias: (B, maps, rows).
    near: (B, maps, tiles, 2), the cells before which and from which on no window of the tile reaches.
    """

    query: Any
    grad: Any
    lse: Any
    delta: Any
    top: Any
    left: Any
    bias: Any
    near: Any


@triton.jit
def window_bias_attention_prepare(
    grad, query, out, centers, weights, bias_scale_ptr, order_ptr, lse_ptr, delta_ptr, ordered, maps,
    min_scale: tl.float64, max_scale: tl.float64, max_bias: tl.float64,
    length, heads, orders,
    MAPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad · out), and one of the tiles if they are wanted, in the orders of the first `orders` maps."""
    tiles = tl.cdiv(length, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    m = tl.program_id(0) // tiles // heads % orders
    b = tl.program_id(0) // tiles // heads // orders
    # [BLOCK_M], as delta, lse, top, left and bias
    offs_i, mask_m = queries(order_ptr, b, m, tile * BLOCK_M, length, MAPS, BLOCK_M)
    do = load_rows(grad, head_of(grad, b, head), offs_i, mask_m, True, DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D], as o and q
    o = load_rows(out, head_of(out, b, head), offs_i, mask_m, True, DIM, BLOCK_D)
    delta = tl.sum(do.to(ACC_DTYPE) * o.to(ACC_DTYPE), axis=1)
    row = (b * heads + head).to(tl.int64) * length + offs_i
    if m == 0:
        tl.store(delta_ptr + row, delta, mask=mask_m)
    if ordered is not None:
        number = (b * MAPS + m).to(tl.int64)
        offs_m = ((number * heads + head) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        offs = offs_m[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [BLOCK_M, BLOCK_D]
        q = load_rows(query, head_of(query, b, head), offs_i, mask_m, True, DIM, BLOCK_D)
        tl.store(ordered.query + offs, q)
        tl.store(ordered.grad + offs, do)
        tl.store(ordered.lse + offs_m, tl.load(lse_ptr + row, mask=mask_m, other=float("inf")))
        tl.store(ordered.delta + offs_m, delta)
        if head == 0:
            _, _, _, _, height, width, window = piece(m, 2**30, maps, MAPS)  # the whole map
            top, left, first, end = windows(centers, b, offs_i, mask_m, m, height, width, window)
            bias = window_bias(weights, bias_scale_ptr, b, offs_i, mask_m, m, min_scale, max_scale, max_bias, ACC_DTYPE)
            number = number * tiles + tile
            offs_m = number * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(ordered.top + offs_m, top)
            tl.store(ordered.left + offs_m, left)
            tl.store(ordered.bias + offs_m, bias)
            tl.store(ordered.near + 2 * number, first)
            tl.store(ordered.near + 2 * number + 1, end)


def prepare(grad, query, out, geometry, maps, limits, wants_tiles, block_m, meta):
    """delta (B, heads, length), and the tiles or None. geometry: centers, weights, bias_scale, order and lse."""
    lse = geometry[-1]
    batch, length, heads, _ = out.shape
    tiles, orders = triton.cdiv(length, block_m), meta["MAPS"] if wants_tiles else 1
    delta = torch.empty((batch, heads, length), dtype=lse.dtype, device=out.device)
    ordered = _empty_tiles(out, lse.dtype, tiles, block_m, meta) if wants_tiles else None
    enqueue(
        window_bias_attention_prepare, tiles * heads * orders * batch,
        grad, query, strided(Heads, out), *geometry, delta, ordered, tuple(maps), *limits,
        length, heads, orders, BLOCK_M=block_m, num_warps=4, **meta,
    )  # fmt: skip
    return delta, ordered


def _empty_tiles(out, dtype, tiles, block_m, meta):
    batch, _, heads, _ = out.shape
    of_map = (batch, meta["MAPS"])
    of_head = (*of_map, heads, tiles * block_m)
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=out.device)  # noqa: E731
    query, grad = (new((*of_head, meta["BLOCK_D"]), out.dtype) for _ in range(2))
    lse, delta = (new(of_head, dtype) for _ in range(2))
    top, left, bias = (new((*of_map, tiles * block_m), kind) for kind in (torch.int32, torch.int32, dtype))
    return Tiles(query, grad, lse, delta, top, left, bias, new((*of_map, tiles, 2), torch.int32))
