"""The forward pass: a program owns a tile of target cells and gathers."""

import torch
import triton
import triton.language as tl

from ...runtime.launch import Image, memory_format, strided, triton_dtype
from ...runtime.plans import enqueue
from .. import configs
from .primitives import (
    Cover,
    blend_weight,
    cells_of,
    corner_share,
    gather,
    geometry_of,
    inverse_count,
    is_each,
    locate,
    prepare,
    source_of,
    tile_cells,
)


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
    v, u, mask_p = tile_cells(tile, tl.arange(0, TILE_H * TILE_W), height, width, TILE_H, TILE_W)  # [TILE_H · TILE_W]
    s, reads = source_of(source_index, n, 0, sources, mask_p)

    acc = tl.zeros([TILE_H * TILE_W, BLOCK_C], dtype=ACC_DTYPE)
    acc1, acc2, acc3 = acc, acc, acc
    covered = tl.zeros([TILE_H * TILE_W], dtype=ACC_DTYPE)
    inverse = inverse_count(depth_count, ACC_DTYPE)
    for d in range(depth_count):
        if EACH:
            s, reads = source_of(source_index, n, d, sources, mask_p)
        left, top, fx, fy = locate(
            projection, depths, offsets, n, d, v, u, reads, source_h, source_w, min_depth, NEAREST, ACC_DTYPE
        )
        w = blend_weight(weights, n, d, v, u, mask_p, inverse, ACC_DTYPE)
        first = cells_of(features, s, top, left)
        at = (features, first, left, top, fx, fy, w, source_h, source_w)
        acc = gather(acc, *at, offs_c, channels, NEAREST)
        if BLOCKS > 1:
            acc1 = gather(acc1, *at, offs_c + BLOCK_C, channels, NEAREST)
        if BLOCKS > 2:
            acc2 = gather(acc2, *at, offs_c + 2 * BLOCK_C, channels, NEAREST)
            acc3 = gather(acc3, *at, offs_c + 3 * BLOCK_C, channels, NEAREST)
        for corner in tl.static_range(1 if NEAREST else 4):
            column, row = left + corner % 2, top + corner // 2
            inside = (column >= 0) & (column < source_w) & (row >= 0) & (row < source_h)
            covered += corner_share(inside, fx, fy, w, corner % 2, corner // 2)

    out = cells_of(warped, n, v, u)
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


def launch_forward(
    features, projection, depths, weights, offsets, source_index, height, width, nearest, min_depth
):  # fmt: skip
    sources, channels, source_h, source_w = features.shape
    targets = projection.shape[0]
    shape = (targets, channels, height, width)
    warped = torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format(features))
    coverage = torch.empty((targets, height, width), dtype=torch.float32, device=features.device)
    depths, offsets, count, dtype, settings = prepare(features, projection, depths, weights, offsets)
    config = configs.forward(*settings)
    tiles = triton.cdiv(height, config["TILE_H"]) * triton.cdiv(width, config["TILE_W"])
    programs = targets * tiles * max(1, triton.cdiv(channels, config["BLOCKS"] * config["BLOCK_C"]))
    if programs:
        enqueue(
            multi_depth_warp_forward, programs,
            strided(Image, features), *geometry_of(projection, depths, weights, offsets, source_index),
            strided(Image, warped), strided(Cover, coverage),
            sources, channels, source_h, source_w, count, height, width, min_depth,
            EACH=is_each(source_index), NEAREST=nearest, ACC_DTYPE=triton_dtype(dtype), **config,
        )  # fmt: skip
    return warped, coverage
