"""What the kernels share: where a target cell is seen in its source, and what stands there."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime import launch
from ...runtime.launch import Matrix, accumulator_dtype, memory_format, strided

LAST = tl.constexpr(2**31 - 1)


class Projection(NamedTuple):
    """(N, 3, 4), (N, 2, 3), or with a depth stride (N, D, 3, 4)."""

    ptr: Any
    target: int
    row: int
    column: int
    depth: int | None = None


class Index(NamedTuple):
    """(N,), or with a depth stride (N, D). No None among these: triton 3.6 could not tell whether there is an index."""

    ptr: Any
    target: int
    depth: int = 0


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
def tile_cells(tile, offs, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row, column and validity, each [cells], of the cells `offs` of a tile."""
    tiles_x = tl.cdiv(width, TILE_W)
    v = (tile // tiles_x) * TILE_H + offs // TILE_W
    u = (tile % tiles_x) * TILE_W + offs % TILE_W
    return v, u, (v < height) & (u < width)


@triton.jit
def cells_of(image, n, v, u):
    """[cells] pointers to channel 0. In 64 bits: any map may exceed 2^31 elements."""
    return image.ptr + n * image.batch + v.to(tl.int64) * image.row + u.to(tl.int64) * image.column


@triton.jit
def planes_of(planes, n, d, v, u):
    """[cells] pointers into (N, D, H, W) or to the first component of (N, D, H, W, 2)."""
    return planes.ptr + n * planes.target + d * planes.depth + v.to(tl.int64) * planes.row + u * planes.column


@triton.jit
def locate(
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
        pair = planes_of(offsets, n, d, v, u)
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
def inverse_count(depth_count, ACC_DTYPE: tl.constexpr):
    """1/D, the weight of each hypothesis where no weights are given."""
    one = tl.full([], 1.0, ACC_DTYPE)
    return _divide(one, one * depth_count)


@triton.jit
def blend_weight(weights, n, d, v, u, mask, inverse, ACC_DTYPE: tl.constexpr):
    """[cells]: the weight of hypothesis d."""
    if weights is not None:
        return tl.load(planes_of(weights, n, d, v, u), mask=mask, other=0.0).to(ACC_DTYPE)
    else:
        return tl.zeros(v.shape, ACC_DTYPE) + inverse


@triton.jit
def source_of(source_index, n, d, sources, mask):
    """The map that target n reads, by hypothesis d where each has its own, and `mask` emptied where there is none."""
    if source_index is None:
        return n, mask
    else:
        s = tl.load(source_index.ptr + n * source_index.target + d * source_index.depth).to(tl.int64)
        return s, mask & (s >= 0) & (s < sources)


@triton.jit
def load_corner(
    features, first, left, top, source_h, source_w, offs_c, mask_c, RIGHT: tl.constexpr, DOWN: tl.constexpr
):
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
def gather(
    acc, features, first, left, top, fx, fy, w, source_h, source_w, offs_c, channels, NEAREST: tl.constexpr
):  # fmt: skip
    """acc [cells, channels] and what the cells find at one location each, weighted by w [cells]."""
    for corner in tl.static_range(1 if NEAREST else 4):
        inside, f = load_corner(
            features, first, left, top, source_h, source_w, offs_c, offs_c < channels, corner % 2, corner // 2
        )
        share = corner_share(inside, fx, fy, w, corner % 2, corner // 2)
        acc += share[:, None] * f.to(acc.dtype)
    return acc


@triton.jit
def corner_share(inside, fx, fy, w, RIGHT: tl.constexpr, DOWN: tl.constexpr):
    """[cells]: a corner's share of the sample times the weight; zero outside."""
    share = (fx if RIGHT else 1 - fx) * (fy if DOWN else 1 - fy)
    return tl.where(inside, share * w, 0.0)


def prepare(features, projection, depths, weights, offsets):
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


def geometry_of(projection, depths, weights, offsets, source_index):
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


def is_each(source_index):
    """Whether each hypothesis has a source map of its own."""
    return source_index is not None and source_index.ndim == 2
