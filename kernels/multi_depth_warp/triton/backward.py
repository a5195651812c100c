"""The gradients: of weights and offsets by tiles of target cells, of the features by tiles of source cells.

A tile of source cells visits, in a fixed order, the target tiles that may touch it; the shares of the target cells in
the source cells form a matrix, so the sum runs on the tensor cores.
"""

import math

import torch
import triton
import triton.language as tl

from ...runtime.launch import Image, strided, triton_dtype
from ...runtime.plans import enqueue
from .. import configs
from .primitives import (
    LAST,
    Planes,
    blend_weight,
    cells_of,
    geometry_of,
    inverse_count,
    is_each,
    load_corner,
    locate,
    planes_of,
    prepare,
    source_of,
    tile_cells,
)


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
    v, u, mask_p = tile_cells(tile, tl.arange(0, TILE_H * TILE_W), height, width, TILE_H, TILE_W)  # [TILE_H · TILE_W]
    s, reads = source_of(source_index, n, 0, sources, mask_p)
    grad_p = cells_of(grad, n, v, u)  # [cells], as are left, top, fx, fy, w and dw below
    dx = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)
    dy = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)

    for d in range(depth_count):
        if EACH:
            s, reads = source_of(source_index, n, d, sources, mask_p)
        left, top, fx, fy = locate(
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
            w = blend_weight(weights, n, d, v, u, mask_p, inverse_count(depth_count, ACC_DTYPE), ACC_DTYPE)
            first = cells_of(features, s, top, left)
            for start_c in range(0, channels, BLOCK_C):
                offs_c = start_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
                mask_c = offs_c < channels
                pointers = grad_p[:, None] + offs_c.to(tl.int64)[None, :] * grad.channel  # [cells, BLOCK_C], as dout, f
                dout = tl.load(pointers, mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(ACC_DTYPE)
                sample = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                slope_x = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                slope_y = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
                for corner in tl.static_range(1 if NEAREST else 4):
                    inside, f = load_corner(
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
                tl.store(planes_of(dweights, n, d, v, u), dw, mask=mask_p)
            if doffsets is not None and not SHARED_OFFSETS:
                pair = planes_of(doffsets, n, d, v, u)
                tl.store(pair, dx, mask=mask_p)
                tl.store(pair + doffsets.component, dy, mask=mask_p)
    if doffsets is not None and SHARED_OFFSETS:
        pair = planes_of(doffsets, n, 0, v, u)
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
    v, u, mask_p = tile_cells(tile, offs, height, width, TILE_H, TILE_W)
    pointers = cells_of(grad, n, v, u)[:, None] + offs_c.to(tl.int64)[None, :] * grad.channel
    # Not masked by what counts, so that the loads need not wait for one another.
    dout = tl.load(pointers, mask=mask_p[:, None] & mask_c[None, :], other=0.0)
    w = blend_weight(weights, n, d, v, u, mask_p, inverse_count(depth_count, ACC_DTYPE), ACC_DTYPE)
    left, top, fx, fy = locate(
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
    row, column, mask_p = tile_cells(tile, offs_s, source_h, source_w, SOURCE_H, SOURCE_W)
    # [source cells, BLOCK_C]
    out = cells_of(dfeatures, s, row, column)[:, None] + offs_c.to(tl.int64)[None, :] * dfeatures.channel
    tl.store(out, acc, mask=mask_p[:, None] & mask_c[None, :])


def launch_backward(
    grad, features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth, needs_grad
):  # fmt: skip
    inputs = (features, weights, offsets)
    gradients = [torch.empty_like(t) if needed else None for t, needed in zip(inputs, needs_grad)]
    dfeatures, dweights, doffsets = gradients
    sources, channels, source_h, source_w = features.shape
    targets = projection.shape[0]
    shared_offsets = offsets is not None and offsets.shape[1] == 1
    depths, offsets, count, dtype, settings = prepare(features, projection, depths, weights, offsets)
    target_config, source_config = configs.backward_target(*settings), configs.backward_features(*settings)
    target_tile = {key: target_config[key] for key in ("TILE_H", "TILE_W")}
    tiles = triton.cdiv(height, target_tile["TILE_H"]) * triton.cdiv(width, target_tile["TILE_W"])
    geometry = geometry_of(projection, depths, weights, offsets, source_index)
    common = dict(EACH=is_each(source_index), NEAREST=nearest, ACC_DTYPE=triton_dtype(dtype))
    boxes = None
    if dfeatures is not None:
        boxes = torch.empty((4, targets, count, tiles), dtype=torch.int32, device=features.device)
    if targets * tiles:
        enqueue(
            multi_depth_warp_backward_target, targets * tiles,
            strided(Image, grad), strided(Image, features), *geometry, strided(Planes, dweights),
            strided(Planes, doffsets), boxes,
            sources, channels, source_h, source_w, count, height, width, min_depth,
            SHARED_OFFSETS=shared_offsets, **common, **target_config,
        )  # fmt: skip
    if dfeatures is not None and dfeatures.numel():
        blocks = (source_h, "SOURCE_H"), (source_w, "SOURCE_W"), (channels, "BLOCK_C")
        programs = sources * math.prod(triton.cdiv(size, source_config[block]) for size, block in blocks)
        dot_dtype, precision = configs.dot(features.dtype, dtype)
        enqueue(
            multi_depth_warp_backward_features, programs,
            strided(Image, grad), *geometry, boxes, strided(Image, dfeatures),
            targets, channels, source_h, source_w, count, height, width, min_depth,
            DOT_DTYPE=triton_dtype(dot_dtype), PRECISION=precision, **common, **target_tile, **source_config,
        )  # fmt: skip
    return gradients
