"""What the kernels share: where a program's keys lie, and the queries' windows among them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2.0**30)


class Centers(NamedTuple):
    """(B, Lq, maps, 2)."""

    ptr: Any
    batch: int
    query: int
    map: int
    component: int


class Weights(NamedTuple):
    """(B, Lq, maps)."""

    ptr: Any
    batch: int
    query: int
    map: int


@triton.jit
def piece(number, size, maps, MAPS: tl.constexpr):
    """Piece `number` when every map is cut into pieces of `size` cells from its own start.

    Returns the map, the token of its first cell, the first cell and the end of the piece, height, width, window.
    """
    m, start, begin, height, width, window = 0, 0, 0, 0, 0, 0
    next_piece, next_start = 0, 0
    for each in tl.static_range(MAPS):
        here = number >= next_piece
        m = tl.where(here, each, m)
        start = tl.where(here, next_start, start)
        begin = tl.where(here, (number - next_piece) * size, begin)
        height = tl.where(here, maps[3 * each], height)
        width = tl.where(here, maps[3 * each + 1], width)
        window = tl.where(here, maps[3 * each + 2], window)
        next_piece += tl.cdiv(maps[3 * each] * maps[3 * each + 1], size)
        next_start += maps[3 * each] * maps[3 * each + 1]
    return m, start, begin, tl.minimum(begin + size, height * width), height, width, window


@triton.jit
def queries(order_ptr, b, m, start_m, length, MAPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_M]: a tile of queries in the order of their rows on map m, and which of them exist."""
    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < length
    return tl.load(order_ptr + (b.to(tl.int64) * MAPS + m) * length + offs_m, mask=mask_m, other=0), mask_m


@triton.jit
def corner(centers, b, offs_i, mask, m, height, width, window):
    """First column and row of the windows of `offs_i` on map m, and whether they touch it; shapes broadcast.

    Floats: what is NaN or huge, and touches nothing, never becomes an integer.
    """
    center_ptr = centers.ptr + b.to(tl.int64) * centers.batch + offs_i * centers.query + m * centers.map
    left = tl.floor(tl.load(center_ptr, mask=mask, other=float("nan")) + 0.5) - window // 2
    top = tl.floor(tl.load(center_ptr + centers.component, mask=mask, other=float("nan")) + 0.5) - window // 2
    return left, top, (left > -window) & (left < width) & (top > -window) & (top < height)


@triton.jit
def windows(centers, b, offs_i, mask_m, m, height, width, window):
    """[BLOCK_M]: first row and column of each query's window on map m; far off it if the window does not touch it.

    Also the cells before which and from which on no window of the tile reaches.
    """
    left, top, touches = corner(centers, b, offs_i, mask_m, m, height, width, window)
    left = tl.where(touches, left, FAR).to(tl.int32)
    top = tl.where(touches, top, FAR).to(tl.int32)
    first = tl.min(tl.where(touches, tl.maximum(top, 0), height), axis=0)
    end = tl.max(tl.where(touches, tl.minimum(top + window, height), 0), axis=0)
    return top, left, first * width, end * width


@triton.jit
def clamp(x, low, high):
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def window_bias(
    weights, bias_scale_ptr, b, offs_i, mask_m, m, min_scale, max_scale, max_bias, ACC_DTYPE: tl.constexpr
):  # fmt: skip
    """[BLOCK_M]: each query's bias in its window on map m, times log2(e)."""
    s = clamp(
        tl.load(bias_scale_ptr).to(ACC_DTYPE), tl.full([], min_scale, ACC_DTYPE), tl.full([], max_scale, ACC_DTYPE)
    )
    weight_ptr = weights.ptr + b.to(tl.int64) * weights.batch + offs_i * weights.query + m * weights.map  # [BLOCK_M]
    weight = tl.load(weight_ptr, mask=mask_m, other=0.0).to(ACC_DTYPE)
    limit = tl.full([], max_bias, ACC_DTYPE)
    return clamp(s * weight, -limit, limit) * LOG2_E


@triton.jit
def inside(cells, width, top, left, window):
    """Whether `cells` lie in the windows; the shapes of `cells` and of `top` and `left` broadcast."""
    row = cells // width
    column = cells - row * width
    # What is before the window, less than nothing, is a huge number without a sign.
    side = tl.minimum(window, 2**30).to(tl.uint32)
    return ((row - top).to(tl.uint32, bitcast=True) < side) & ((column - left).to(tl.uint32, bitcast=True) < side)


def pieces(maps: list[int], size: int) -> list[int]:
    """How many pieces of `size` cells each map has."""
    return [-(-height * width // size) for height, width in zip(maps[::3], maps[1::3])]
