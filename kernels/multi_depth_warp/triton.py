"""Triton backend. Neither direction stores a plane, uses atomics or clears a buffer.

Forward and the gradients of weights and offsets: a program owns a tile of target cells and gathers. Gradient of the
features: a program owns a tile of source cells and visits, in a fixed order, the target tiles that may touch it; the
shares of the target cells in the source cells form a matrix, so the sum runs on the tensor cores.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import launch
from ..runtime.launch import Image, Matrix, accumulator_dtype, memory_format, strided, triton_dtype
from . import configs

LAST = tl.constexpr(2**31 - 1)


class Projection(NamedTuple):
    """(N, 3, 4), (N, 2, 3), or with a depth stride (N, D, 3, 4)."""

    ptr: Any
    target: int
    row: int
    column: int
    depth: int | None = None


class Index(NamedTuple):
    """(N,), or with a depth stride (N, D)."""

    ptr: Any
    target: int
    depth: int | None = None


class Planes(NamedTuple):
    """(N, D, H, W), or (N, D, H, W, 2) with components."""

    ptr: Any
    target: int
    depth: int
    row: int
    column: int
    component: int = 0


class Cover(NamedTuple):
    """(N, H, W)."""

    ptr: Any
    target: int
    row: int
    column: int


@triton.jit
def _divide(a, b):
    # float32 division is approximate on GPUs unless asked otherwise; an identity must return its input.
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _tile(tile, offs, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row, column and validity, each [cells], of the cells `offs` of a tile."""
    tiles_x = tl.cdiv(width, TILE_W)
    v = (tile // tiles_x) * TILE_H + offs // TILE_W
    u = (tile % tiles_x) * TILE_W + offs % TILE_W
    return v, u, (v < height) & (u < width)


@triton.jit
def _cells(image, n, v, u):
    """[cells] pointers to channel 0. In 64 bits: any map may exceed 2^31 elements."""
    return image.ptr + n * image.batch + v.to(tl.int64) * image.row + u.to(tl.int64) * image.column


@triton.jit
def _planes(planes, n, d, v, u):
    """[cells] pointers into (N, D, H, W) or to the first component of (N, D, H, W, 2)."""
    return planes.ptr + n * planes.target + d * planes.depth + v.to(tl.int64) * planes.row + u * planes.column


@triton.jit
def _locate(
    projection, depths, offsets, n, d, v, u, mask, source_h, source_w, min_depth,
    NEAREST: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Top left cell (left, top) that each location touches, −2 where it counts nothing, and the fractions beyond it.

    All blocks are [cells].
    """
    entry = projection.ptr + n * projection.target
    if projection.depth is not None:
        entry += d * projection.depth
    column = projection.column
    across, down = u.to(ACC_DTYPE), v.to(ACC_DTYPE)
    x = tl.load(entry).to(ACC_DTYPE) * across + tl.load(entry + column).to(ACC_DTYPE) * down
    x += tl.load(entry + 2 * column).to(ACC_DTYPE)
    entry_y = entry + projection.row
    y = tl.load(entry_y).to(ACC_DTYPE) * across + tl.load(entry_y + column).to(ACC_DTYPE) * down
    y += tl.load(entry_y + 2 * column).to(ACC_DTYPE)
    if depths is not None:
        depth = tl.load(depths.ptr + n * depths.row + d * depths.column).to(ACC_DTYPE)
        entry_z = entry_y + projection.row
        z = tl.load(entry_z).to(ACC_DTYPE) * across + tl.load(entry_z + column).to(ACC_DTYPE) * down
        z = (z + tl.load(entry_z + 2 * column).to(ACC_DTYPE)) * depth + tl.load(entry_z + 3 * column).to(ACC_DTYPE)
        mask &= z > tl.full([], min_depth, ACC_DTYPE)
        x = _divide(x * depth + tl.load(entry + 3 * column).to(ACC_DTYPE), z)
        y = _divide(y * depth + tl.load(entry_y + 3 * column).to(ACC_DTYPE), z)
    if offsets is not None:
        pair = _planes(offsets, n, d, v, u)
        x += tl.load(pair, mask=mask, other=0.0).to(ACC_DTYPE)
        y += tl.load(pair + offsets.component, mask=mask, other=0.0).to(ACC_DTYPE)
    shift = 0.5 if NEAREST else 0.0
    left, top = tl.floor(x + shift), tl.floor(y + shift)
    # Tested as floats: what is NaN or huge never becomes an integer.
    mask &= (left >= -1) & (left < source_w) & (top >= -1) & (top < source_h)
    between = mask & (not NEAREST)
    fx, fy = tl.where(between, x - left, 0.0), tl.where(between, y - top, 0.0)
    return tl.where(mask, left, -2).to(tl.int32), tl.where(mask, top, -2).to(tl.int32), fx, fy


@triton.jit
def _inverse(depth_count, ACC_DTYPE: tl.constexpr):
    """1/D, the weight of each hypothesis where no weights are given."""
    one = tl.full([], 1.0, ACC_DTYPE)
    return _divide(one, one * depth_count)


@triton.jit
def _blend(weights, n, d, v, u, mask, inverse, ACC_DTYPE: tl.constexpr):
    """[cells]: the weight of hypothesis d."""
    if weights is not None:
        return tl.load(_planes(weights, n, d, v, u), mask=mask, other=0.0).to(ACC_DTYPE)
    else:
        return tl.zeros(v.shape, ACC_DTYPE) + inverse


@triton.jit
def _source(source_index, n, d, sources, mask):
    """The map that target n reads, by hypothesis d where each has its own, and `mask` emptied where there is none."""
    if source_index is None:
        return n, mask
    else:
        place = source_index.ptr + n * source_index.target
        if source_index.depth is not None:
            place += d * source_index.depth
        s = tl.load(place).to(tl.int64)
        return s, mask & (s >= 0) & (s < sources)


@triton.jit
def _corner(features, first, left, top, source_h, source_w, offs_c, mask_c, RIGHT: tl.constexpr, DOWN: tl.constexpr):
    """One of the cells that a location touches: where it is inside [cells], its features [cells, channels].

    first: [cells] pointers to the top left one, which may lie outside.
    """
    column, row = left + RIGHT, top + DOWN  # [cells]
    inside = (column >= 0) & (column < source_w) & (row >= 0) & (row < source_h)  # [cells]
    if RIGHT:
        first += features.column
    if DOWN:
        first += features.row
    pointers = first[:, None] + offs_c.to(tl.int64)[None, :] * features.channel  # [cells, channels]
    return inside, tl.load(pointers, mask=inside[:, None] & mask_c[None, :], other=0.0)


@triton.jit
def _gather(
    acc, features, first, left, top, fx, fy, w, source_h, source_w, offs_c, channels, NEAREST: tl.constexpr
):  # fmt: skip
    """acc [cells, channels] and what the cells find at one location each, weighted by w [cells]."""
    for corner in tl.static_range(1 if NEAREST else 4):
        inside, f = _corner(
            features, first, left, top, source_h, source_w, offs_c, offs_c < channels, corner % 2, corner // 2
        )
        share = _share(inside, fx, fy, w, corner % 2, corner // 2)
        acc += share[:, None] * f.to(acc.dtype)
    return acc


@triton.jit
def _share(inside, fx, fy, w, RIGHT: tl.constexpr, DOWN: tl.constexpr):
    """[cells]: a corner's share of the sample times the weight; zero outside."""
    share = (fx if RIGHT else 1 - fx) * (fy if DOWN else 1 - fy)
    return tl.where(inside, share * w, 0.0)


@triton.jit
def multi_depth_warp_forward(
    features, projection, depths, weights, offsets, source_index, warped, coverage,
    sources, channels, source_h, source_w, depth_count, height, width, min_depth: tl.float64,
    EACH: tl.constexpr, NEAREST: tl.constexpr, ACC_DTYPE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of a tile of target cells BLOCKS · BLOCK_C channels, in up to 4 sums, so that a location is found once for all
    and few threads find the same one."""
    blocks_c = tl.maximum(tl.cdiv(channels, BLOCKS * BLOCK_C), 1)
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    pid = tl.program_id(0)
    block_c, tile, n = pid % blocks_c, pid // blocks_c % tiles, (pid // blocks_c // tiles).to(tl.int64)
    offs_c = block_c * BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    v, u, mask_p = _tile(tile, tl.arange(0, TILE_H * TILE_W), height, width, TILE_H, TILE_W)  # [TILE_H · TILE_W]
    s, reads = _source(source_index, n, 0, sources, mask_p)

    acc = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
    acc1, acc2, acc3 = acc, acc, acc
    covered = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)
    inverse = _inverse(depth_count, ACC_DTYPE)
    for d in range(depth_count):
        if EACH:
            s, reads = _source(source_index, n, d, sources, mask_p)
        left, top, fx, fy = _locate(
            projection, depths, offsets, n, d, v, u, reads, source_h, source_w, min_depth, NEAREST, ACC_DTYPE
        )
        w = _blend(weights, n, d, v, u, mask_p, inverse, ACC_DTYPE)
        first = _cells(features, s, top, left)
        at = (features, first, left, top, fx, fy, w, source_h, source_w)
        acc = _gather(acc, *at, offs_c, channels, NEAREST)
        if BLOCKS > 1:
            acc1 = _gather(acc1, *at, offs_c + BLOCK_C, channels, NEAREST)
        if BLOCKS > 2:
            acc2 = _gather(acc2, *at, offs_c + 2 * BLOCK_C, channels, NEAREST)
            acc3 = _gather(acc3, *at, offs_c + 3 * BLOCK_C, channels, NEAREST)
        for corner in tl.static_range(1 if NEAREST else 4):
            column, row = left + corner % 2, top + corner // 2
            inside = (column >= 0) & (column < source_w) & (row >= 0) & (row < source_h)
            covered += _share(inside, fx, fy, w, corner % 2, corner // 2)

    out = _cells(warped, n, v, u)
    _put(warped, out, offs_c, channels, mask_p, acc)
    if BLOCKS > 1:
        _put(warped, out, offs_c + BLOCK_C, channels, mask_p, acc1)
    if BLOCKS > 2:
        _put(warped, out, offs_c + 2 * BLOCK_C, channels, mask_p, acc2)
        _put(warped, out, offs_c + 3 * BLOCK_C, channels, mask_p, acc3)
    if block_c == 0:
        cover = coverage.ptr + n * coverage.target + v.to(tl.int64) * coverage.row + u * coverage.column
        tl.store(cover, covered, mask=mask_p)


@triton.jit
def _put(warped, out, offs_c, channels, mask_p, values):
    pointers = out[:, None] + offs_c.to(tl.int64)[None, :] * warped.channel
    tl.store(pointers, values, mask=mask_p[:, None] & (offs_c < channels)[None, :])


@triton.jit
def multi_depth_warp_backward_target(
    grad, features, projection, depths, weights, offsets, source_index, dweights, doffsets, boxes_ptr,
    sources, channels, source_h, source_w, depth_count, height, width, min_depth: tl.float64,
    EACH: tl.constexpr, NEAREST: tl.constexpr, SHARED_OFFSETS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weights and offsets, and for each tile and depth the box of source cells that it touches."""
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    tile, n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    v, u, mask_p = _tile(tile, tl.arange(0, TILE_H * TILE_W), height, width, TILE_H, TILE_W)  # [TILE_H · TILE_W]
    s, reads = _source(source_index, n, 0, sources, mask_p)
    grad_p = _cells(grad, n, v, u)  # [cells], as are left, top, fx, fy, w and dw below
    dx = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)
    dy = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)

    for d in range(depth_count):
        if EACH:
            s, reads = _source(source_index, n, d, sources, mask_p)
        left, top, fx, fy = _locate(
            projection, depths, offsets, n, d, v, u, reads, source_h, source_w, min_depth, NEAREST, ACC_DTYPE
        )
        counts = left > -2
        if boxes_ptr is not None:
            # Planes of (x first, x last, y first, y last), each (N, D, tiles).
            box = boxes_ptr + (n * depth_count + d) * tiles + tile
            plane = tl.num_programs(0).to(tl.int64) * depth_count
            reach = 0 if NEAREST else 1
            tl.store(box, tl.min(tl.where(counts, left, LAST), axis=0))
            tl.store(box + plane, tl.max(tl.where(counts, left + reach, -1), axis=0))
            tl.store(box + 2 * plane, tl.min(tl.where(counts, top, LAST), axis=0))
            tl.store(box + 3 * plane, tl.max(tl.where(counts, top + reach, -1), axis=0))
        if dweights is not None or doffsets is not None:
            dw = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)
            if not SHARED_OFFSETS:
                dx, dy = tl.zeros_like(dx), tl.zeros_like(dy)
            w = _blend(weights, n, d, v, u, mask_p, _inverse(depth_count, ACC_DTYPE), ACC_DTYPE)
            first = _cells(features, s, top, left)
            for start_c in range(0, channels, BLOCK_C):
                offs_c = start_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
                mask_c = offs_c < channels
                pointers = grad_p[:, None] + offs_c.to(tl.int64)[None, :] * grad.channel  # [cells, BLOCK_C], as dout, f
                dout = tl.load(pointers, mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(ACC_DTYPE)
                sample = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                slope_x = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                slope_y = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                for corner in tl.static_range(1 if NEAREST else 4):
                    inside, f = _corner(
                        features, first, left, top, source_h, source_w, offs_c, mask_c, corner % 2, corner // 2
                    )
                    f = f.to(ACC_DTYPE)
                    share_x = fx if corner % 2 else 1 - fx
                    share_y = fy if corner // 2 else 1 - fy
                    sample += (share_x * share_y)[:, None] * f
                    if doffsets is not None and not NEAREST:
                        slope_x += (share_y if corner % 2 else -share_y)[:, None] * f
                        slope_y += (share_x if corner // 2 else -share_x)[:, None] * f
                if dweights is not None:
                    dw += tl.where(counts, tl.sum(dout * sample, axis=1), 0.0)
                if doffsets is not None and not NEAREST:
                    dx += tl.where(counts, w * tl.sum(dout * slope_x, axis=1), 0.0)
                    dy += tl.where(counts, w * tl.sum(dout * slope_y, axis=1), 0.0)
            if dweights is not None:
                tl.store(_planes(dweights, n, d, v, u), dw, mask=mask_p)
            if doffsets is not None and not SHARED_OFFSETS:
                pair = _planes(doffsets, n, d, v, u)
                tl.store(pair, dx, mask=mask_p)
                tl.store(pair + doffsets.component, dy, mask=mask_p)
    if doffsets is not None and SHARED_OFFSETS:
        pair = _planes(doffsets, n, 0, v, u)
        tl.store(pair, dx, mask=mask_p)
        tl.store(pair + doffsets.component, dy, mask=mask_p)


@triton.jit
def _shares(
    grad, projection, depths, weights, offsets, n, d, tile, offs, sx, sy, offs_c, mask_c,
    source_h, source_w, depth_count, height, width, min_depth,
    NEAREST: tl.constexpr, ACC_DTYPE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Of the cells `offs` of a target tile: the tents at the source cells [source cells, cells], the weights [cells],
    and the incoming gradient [cells, channels]."""
    v, u, mask_p = _tile(tile, offs, height, width, TILE_H, TILE_W)
    pointers = _cells(grad, n, v, u)[:, None] + offs_c.to(tl.int64)[None, :] * grad.channel
    # Not masked by what counts, so that the loads need not wait for one another.
    dout = tl.load(pointers, mask=mask_p[:, None] & mask_c[None, :], other=0.0)
    w = _blend(weights, n, d, v, u, mask_p, _inverse(depth_count, ACC_DTYPE), ACC_DTYPE)
    left, top, fx, fy = _locate(
        projection, depths, offsets, n, d, v, u, mask_p, source_h, source_w, min_depth, NEAREST, ACC_DTYPE
    )
    # Nearest: the fractions are 0, and so are all tents but that of the cell itself.
    tent_x = tl.maximum(1 - tl.abs((left + fx)[None, :] - sx[:, None]), 0.0)  # [source cells, cells], as tent_y
    tent_y = tl.maximum(1 - tl.abs((top + fy)[None, :] - sy[:, None]), 0.0)
    return tent_x * tent_y, w, dout


@triton.jit
def _walk(
    grad, projection, depths, weights, offsets, source_index, boxes_ptr, s, first_x, first_y, offs_c, mask_c,
    targets, source_h, source_w, depth_count, height, width, min_depth,
    EACH: tl.constexpr, NEAREST: tl.constexpr, CAREFUL: tl.constexpr, ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SOURCE_H: tl.constexpr, SOURCE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of source cells: over the readers of map s and their boxes, in order.

    A reader is a target, its boxes those of all depths and tiles; or, where EACH hypothesis has a map of its own, a
    hypothesis of a target, its boxes those of the tiles.
    In a dot 0 · NaN is NaN, so what is not finite spreads over a tile. CAREFUL: cell by cell, to where it belongs.
    """
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    readers, boxes = targets, depth_count * tiles
    if EACH:
        readers, boxes = targets * depth_count, tiles
    plane = tl.cast(readers, tl.int64) * boxes
    offs_s = tl.arange(0, SOURCE_H * SOURCE_W)
    sx, sy = first_x + offs_s % SOURCE_W, first_y + offs_s // SOURCE_W  # [SOURCE_H · SOURCE_W]
    acc = tl.zeros([SOURCE_H * SOURCE_W, offs_c.shape[0]], dtype=ACC_DTYPE)
    for start_r in range(0, readers, BLOCK_N):
        offs_r = start_r + tl.arange(0, BLOCK_N)  # [BLOCK_N], as index and reads
        index = offs_r.to(tl.int64)
        if source_index is not None:
            place = source_index.ptr + index * source_index.target
            if EACH:
                place = source_index.ptr + index // depth_count * source_index.target
                place += index % depth_count * source_index.depth
            index = tl.load(place, mask=offs_r < readers, other=-1).to(tl.int64)
        reads = (index == s) & (offs_r < readers)
        for _ in range(tl.sum(reads.to(tl.int32), axis=0)):
            r = tl.min(tl.where(reads, offs_r, LAST), axis=0)
            reads &= offs_r > r
            n, first_d = r.to(tl.int64), 0
            if EACH:
                n, first_d = (r // depth_count).to(tl.int64), r % depth_count
            for start_b in range(0, boxes, BLOCK_B):
                offs_b = start_b + tl.arange(0, BLOCK_B)  # [BLOCK_B], as all about boxes
                mask_b = offs_b < boxes
                box = boxes_ptr + r.to(tl.int64) * boxes + offs_b
                near = mask_b & (tl.load(box, mask=mask_b, other=LAST) < first_x + SOURCE_W)
                near &= tl.load(box + plane, mask=mask_b, other=-1) >= first_x
                near &= tl.load(box + 2 * plane, mask=mask_b, other=LAST) < first_y + SOURCE_H
                near &= tl.load(box + 3 * plane, mask=mask_b, other=-1) >= first_y
                for _ in range(tl.sum(near.to(tl.int32), axis=0)):
                    b = tl.min(tl.where(near, offs_b, LAST), axis=0)
                    near &= offs_b > b
                    if CAREFUL:
                        for cell in range(TILE_H * TILE_W):
                            tent, w, dout = _shares(
                                grad, projection, depths, weights, offsets, n, first_d + b // tiles, b % tiles,
                                cell + tl.arange(0, 1), sx, sy, offs_c, mask_c,
                                source_h, source_w, depth_count, height, width, min_depth,
                                NEAREST, ACC_DTYPE, TILE_H, TILE_W,
                            )  # fmt: skip
                            acc += tl.where(tent > 0, tent * w[None, :] * dout.to(ACC_DTYPE), 0.0)
                    else:
                        tent, w, dout = _shares(
                            grad, projection, depths, weights, offsets, n, first_d + b // tiles, b % tiles,
                            tl.arange(0, TILE_H * TILE_W), sx, sy, offs_c, mask_c,
                            source_h, source_w, depth_count, height, width, min_depth,
                            NEAREST, ACC_DTYPE, TILE_H, TILE_W,
                        )  # fmt: skip
                        share = (tent * w[None, :]).to(DOT_DTYPE)  # [source cells, cells]
                        acc = tl.dot(share, dout.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return acc


@triton.jit
def multi_depth_warp_backward_features(
    grad, projection, depths, weights, offsets, source_index, boxes_ptr, dfeatures,
    targets, channels, source_h, source_w, depth_count, height, width, min_depth: tl.float64,
    EACH: tl.constexpr, NEAREST: tl.constexpr, ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, SOURCE_H: tl.constexpr, SOURCE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(channels, BLOCK_C)
    tiles_x = tl.cdiv(source_w, SOURCE_W)
    tiles = tl.cdiv(source_h, SOURCE_H) * tiles_x
    pid = tl.program_id(0)
    block_c, tile, s = pid % blocks_c, pid // blocks_c % tiles, (pid // blocks_c // tiles).to(tl.int64)
    offs_c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask_c = offs_c < channels
    first_x, first_y = (tile % tiles_x) * SOURCE_W, (tile // tiles_x) * SOURCE_H
    acc = _walk(
        grad, projection, depths, weights, offsets, source_index, boxes_ptr, s, first_x, first_y, offs_c, mask_c,
        targets, source_h, source_w, depth_count, height, width, min_depth,
        EACH, NEAREST, False, ACC_DTYPE, DOT_DTYPE, PRECISION, TILE_H, TILE_W, SOURCE_H, SOURCE_W, BLOCK_N, BLOCK_B,
    )  # fmt: skip
    if tl.max((acc - acc != 0).to(tl.int32)) > 0:
        acc = _walk(
            grad, projection, depths, weights, offsets, source_index, boxes_ptr, s, first_x, first_y, offs_c, mask_c,
            targets, source_h, source_w, depth_count, height, width, min_depth,
            EACH, NEAREST, True, ACC_DTYPE, DOT_DTYPE, PRECISION, TILE_H, TILE_W, SOURCE_H, SOURCE_W, BLOCK_N, BLOCK_B,
        )  # fmt: skip
    offs_s = tl.arange(0, SOURCE_H * SOURCE_W)  # [source cells]
    row, column, mask_p = _tile(tile, offs_s, source_h, source_w, SOURCE_H, SOURCE_W)
    # [source cells, BLOCK_C]
    out = _cells(dfeatures, s, row, column)[:, None] + offs_c.to(tl.int64)[None, :] * dfeatures.channel
    tl.store(out, acc, mask=mask_p[:, None] & mask_c[None, :])


def _prepare(features, projection, depths, weights, offsets):
    """Depths as (N, D), offsets as (N, D, H, W, 2), D, the accumulator's dtype, what configurations depend on."""
    dtype = accumulator_dtype(*(t.dtype for t in (features, projection, depths, weights, offsets) if t is not None))
    channels_last = memory_format(features) == torch.channels_last
    kind = dtype if dtype == torch.float64 else features.dtype
    settings = (launch.architecture(features.device), features.shape[1], channels_last, kind)
    if depths is None:
        return None, None, 1, dtype, settings
    depths = depths.expand(projection.shape[0], -1)
    count = depths.shape[1]
    return depths, None if offsets is None else offsets.expand(-1, count, -1, -1, -1), count, dtype, settings


def _geometry(projection, depths, weights, offsets, source_index):
    return (
        _strided_by_depth(Projection, projection, 4), strided(Matrix, depths), strided(Planes, weights),
        strided(Planes, offsets), _strided_by_depth(Index, source_index, 2),
    )  # fmt: skip


def _strided_by_depth(kind, tensor, dims):
    """The named tuple of a tensor (N, …) or, with `dims` dimensions, (N, D, …)."""
    if tensor is None or tensor.ndim < dims:
        return strided(kind, tensor)
    target, depth, *others = tensor.stride()
    return kind(tensor, target, *others, depth)


def _each(source_index):
    """Whether each hypothesis has a source map of its own."""
    return source_index is not None and source_index.ndim == 2


def launch_forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    sources, channels, source_h, source_w = features.shape
    targets = projection.shape[0]
    shape = (targets, channels, height, width)
    warped = torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format(features))
    coverage = torch.empty((targets, height, width), dtype=torch.float32, device=features.device)
    depths, offsets, count, dtype, settings = _prepare(features, projection, depths, weights, offsets)
    config = configs.forward(*settings)
    tiles = triton.cdiv(height, config["TILE_H"]) * triton.cdiv(width, config["TILE_W"])
    programs = targets * tiles * max(1, triton.cdiv(channels, config["BLOCKS"] * config["BLOCK_C"]))
    if programs:
        multi_depth_warp_forward[(programs,)](
            strided(Image, features), *_geometry(projection, depths, weights, offsets, source_index),
            strided(Image, warped), strided(Cover, coverage),
            sources, channels, source_h, source_w, count, height, width, min_depth,
            EACH=_each(source_index), NEAREST=nearest, ACC_DTYPE=triton_dtype(dtype), **config,
        )  # fmt: skip
    return warped, coverage


def launch_backward(
    grad, features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth, needs_grad
):  # fmt: skip
    inputs = (features, weights, offsets)
    gradients = [torch.empty_like(t) if needed else None for t, needed in zip(inputs, needs_grad)]
    dfeatures, dweights, doffsets = gradients
    sources, channels, source_h, source_w = features.shape
    targets = projection.shape[0]
    shared_offsets = offsets is not None and offsets.shape[1] == 1
    depths, offsets, count, dtype, settings = _prepare(features, projection, depths, weights, offsets)
    target_config, source_config = configs.backward_target(*settings), configs.backward_features(*settings)
    target_tile = {key: target_config[key] for key in ("TILE_H", "TILE_W")}
    tiles = triton.cdiv(height, target_tile["TILE_H"]) * triton.cdiv(width, target_tile["TILE_W"])
    geometry = _geometry(projection, depths, weights, offsets, source_index)
    common = dict(EACH=_each(source_index), NEAREST=nearest, ACC_DTYPE=triton_dtype(dtype))
    boxes = None
    if dfeatures is not None:
        boxes = torch.empty((4, targets, count, tiles), dtype=torch.int32, device=features.device)
    if targets * tiles:
        multi_depth_warp_backward_target[(targets * tiles,)](
            strided(Image, grad), strided(Image, features), *geometry, strided(Planes, dweights),
            strided(Planes, doffsets), boxes,
            sources, channels, source_h, source_w, count, height, width, min_depth,
            SHARED_OFFSETS=shared_offsets, **common, **target_config,
        )  # fmt: skip
    if dfeatures is not None and dfeatures.numel():
        blocks = (source_h, "SOURCE_H"), (source_w, "SOURCE_W"), (channels, "BLOCK_C")
        programs = sources * math.prod(triton.cdiv(size, source_config[block]) for size, block in blocks)
        dot_dtype, precision = configs.dot(features.dtype, dtype)
        multi_depth_warp_backward_features[(programs,)](
            strided(Image, grad), *geometry, boxes, strided(Image, dfeatures),
            targets, channels, source_h, source_w, count, height, width, min_depth,
            DOT_DTYPE=triton_dtype(dot_dtype), PRECISION=precision, **common, **target_tile, **source_config,
        )  # fmt: skip
    return gradients
