"""Triton backend. Neither direction stores samples or uses atomics.

Forward and the gradients of points and weights: a program owns an anchor and visits its points that count, in order.
Gradient of the maps: which cells a point touches depends on the points alone, so one stable sort of the points by the
cell at their top left, for all levels and whatever the channels, makes the points that touch a cell two runs of a list;
a program owns a cell and walks them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import launch
from ..runtime.launch import accumulator_dtype, triton_dtype
from ..runtime.plans import enqueue
from . import configs

LAST = tl.constexpr(2**31 - 1)


class Maps(NamedTuple):
    """One level, (B, V, C, H, W): pointer, strides, size."""

    ptr: torch.Tensor
    sample: int
    camera: int
    channel: int
    row: int
    column: int
    height: int
    width: int


class Points(NamedTuple):
    """(B, A, P, V, 2)."""

    ptr: torch.Tensor
    sample: int
    anchor: int
    point: int
    camera: int
    axis: int


class Weights(NamedTuple):
    """(B, A, P, V, levels, groups)."""

    ptr: torch.Tensor
    sample: int
    anchor: int
    point: int
    camera: int
    level: int
    group: int


class Rows(NamedTuple):
    """(B, A, C)."""

    ptr: torch.Tensor
    sample: int
    anchor: int
    channel: int


class Visible(NamedTuple):
    """(B, V); ptr is None where every camera is."""

    ptr: torch.Tensor | None
    sample: int
    camera: int


@triton.jit
def _pairs(points, b, a, e, cameras):
    """Pointers to x of the points e = point · cameras + camera of an anchor."""
    p, v = (e // cameras).to(tl.int64), (e % cameras).to(tl.int64)
    return points.ptr + b * points.sample + a * points.anchor + p * points.point + v * points.camera


@triton.jit
def _counting(points, visible, b, a, offs_e, mask_e, cameras):
    """Which of the points offs_e of an anchor count, and where they are."""
    pair = _pairs(points, b, a, offs_e, cameras)
    x = tl.load(pair, mask=mask_e, other=-1.0)
    y = tl.load(pair + points.axis, mask=mask_e, other=-1.0)
    # NaN compares false.
    counts = mask_e & (x > 0) & (x < 1) & (y > 0) & (y < 1)
    if visible.ptr is not None:
        v = (offs_e % cameras).to(tl.int64)
        counts &= tl.load(visible.ptr + b * visible.sample + v * visible.camera, mask=mask_e, other=0) != 0
    return counts, x, y


@triton.jit
def _corners(maps, x, y, ACC_DTYPE: tl.constexpr):
    """Of the four cells that a location touches: column, row, whether it is inside, and the shares along x and y."""
    offs_r = tl.arange(0, 4)
    across, down = x * maps.width - 0.5, y * maps.height - 0.5
    left, top = tl.floor(across), tl.floor(down)
    fx, fy = across - left, down - top
    column, row = left.to(tl.int32) + offs_r % 2, top.to(tl.int32) + offs_r // 2  # [4]
    inside = (column >= 0) & (column < maps.width) & (row >= 0) & (row < maps.height)
    share_x = tl.where(offs_r % 2 == 1, fx, 1 - fx)
    share_y = tl.where(offs_r // 2 == 1, fy, 1 - fy)
    return column.to(tl.int64), row.to(tl.int64), inside, share_x.to(ACC_DTYPE), share_y.to(ACC_DTYPE)


@triton.jit
def deformable_aggregation_forward(
    maps, points, weights, visible, out_ptr,
    batch, anchors, samples, cameras, channels, per_group,
    LEVELS: tl.constexpr, SPLITS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, B, A, C), dense; the sum over the first dimension is the result."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    block_c, split, anchor = pid % blocks_c, pid // blocks_c % SPLITS, pid // blocks_c // SPLITS
    b, a = (anchor // anchors).to(tl.int64), (anchor % anchors).to(tl.int64)
    offs_c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    offs_g = (offs_c // per_group).to(tl.int64)
    offs_c = offs_c.to(tl.int64)

    acc = tl.zeros([4, BLOCK_C], dtype=ACC_DTYPE)  # by corner, summed at the end
    first = split * tl.cdiv(samples, SPLITS)
    last = tl.minimum(first + tl.cdiv(samples, SPLITS), samples)
    for start_e in range(first, last, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        counts, _, _ = _counting(points, visible, b, a, offs_e, offs_e < last, cameras)
        for _ in range(tl.sum(counts.to(tl.int32), axis=0)):
            e = tl.min(tl.where(counts, offs_e, LAST), axis=0)
            counts &= offs_e > e
            pair = _pairs(points, b, a, e, cameras)
            x, y = tl.load(pair), tl.load(pair + points.axis)
            p, v = (e // cameras).to(tl.int64), (e % cameras).to(tl.int64)
            weight = weights.ptr + b * weights.sample + a * weights.anchor + p * weights.point + v * weights.camera
            for level in tl.static_range(LEVELS):
                column, row, inside, share_x, share_y = _corners(maps[level], x, y, ACC_DTYPE)
                cells = maps[level].ptr + b * maps[level].sample + v * maps[level].camera
                cells += row * maps[level].row + column * maps[level].column  # [4]
                f = tl.load(
                    cells[:, None] + offs_c[None, :] * maps[level].channel,
                    mask=inside[:, None] & mask_c[None, :], other=0.0,
                ).to(ACC_DTYPE)  # [4, C]  # fmt: skip
                w = tl.load(weight + level * weights.level + offs_g * weights.group, mask=mask_c, other=0.0)  # [C]
                share = tl.where(inside, share_x * share_y, 0.0)  # [4]
                # Not a product with zero: the weight of what is outside may be anything.
                acc += tl.where(inside[:, None], share[:, None] * w.to(ACC_DTYPE)[None, :] * f, 0.0)
    place = ((split.to(tl.int64) * batch + b) * anchors + a) * channels
    tl.store(out_ptr + place + offs_c, tl.sum(acc, axis=0), mask=mask_c)


@triton.jit
def deformable_aggregation_backward_samples(
    grad, maps, points, weights, visible, dpoints, dweights,
    anchors, samples, cameras, groups, per_group,
    LEVELS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of points and weights, of those that count; the others must be zero already."""
    blocks_e = tl.cdiv(samples, BLOCK_E)
    pid = tl.program_id(0)
    block_e, anchor = pid % blocks_e, pid // blocks_e
    b, a = (anchor // anchors).to(tl.int64), (anchor % anchors).to(tl.int64)
    offs_e = block_e * BLOCK_E + tl.arange(0, BLOCK_E)
    counts, _, _ = _counting(points, visible, b, a, offs_e, offs_e < samples, cameras)
    incoming = grad.ptr + b * grad.sample + a * grad.anchor
    sign_x, sign_y = 2 * (tl.arange(0, 4) % 2) - 1, 2 * (tl.arange(0, 4) // 2) - 1
    for _ in range(tl.sum(counts.to(tl.int32), axis=0)):
        e = tl.min(tl.where(counts, offs_e, LAST), axis=0)
        counts &= offs_e > e
        pair = _pairs(points, b, a, e, cameras)
        x, y = tl.load(pair), tl.load(pair + points.axis)
        p, v = (e // cameras).to(tl.int64), (e % cameras).to(tl.int64)
        dx = tl.zeros([], dtype=ACC_DTYPE)
        dy = tl.zeros([], dtype=ACC_DTYPE)
        for level in tl.static_range(LEVELS):
            column, row, inside, share_x, share_y = _corners(maps[level], x, y, ACC_DTYPE)
            cells = maps[level].ptr + b * maps[level].sample + v * maps[level].camera
            cells += row * maps[level].row + column * maps[level].column  # [4]
            for start_g in range(0, groups, BLOCK_G):
                offs_g = start_g + tl.arange(0, BLOCK_G)
                mask_g = offs_g < groups
                dot = tl.zeros([4, BLOCK_G], dtype=ACC_DTYPE)
                for start_k in range(0, per_group, BLOCK_K):
                    offs_k = start_k + tl.arange(0, BLOCK_K)
                    channel = (offs_g[:, None] * per_group + offs_k[None, :]).to(tl.int64)  # [G, K]
                    mask = mask_g[:, None] & (offs_k < per_group)[None, :]
                    dout = tl.load(incoming + channel * grad.channel, mask=mask, other=0.0).to(ACC_DTYPE)  # [G, K]
                    f = tl.load(
                        cells[:, None, None] + (channel * maps[level].channel)[None, :, :],
                        mask=inside[:, None, None] & mask[None, :, :], other=0.0,
                    ).to(ACC_DTYPE)  # [4, G, K]  # fmt: skip
                    dot += tl.sum(dout[None, :, :] * f, axis=2)
                dot = tl.where(inside[:, None], dot, 0.0)
                place_g = offs_g.to(tl.int64)
                if dweights.ptr is not None:
                    dw = tl.sum((share_x * share_y)[:, None] * dot, axis=0)  # [G]
                    place = b * dweights.sample + a * dweights.anchor + p * dweights.point + v * dweights.camera
                    place += level * dweights.level + place_g * dweights.group
                    tl.store(dweights.ptr + place, dw, mask=mask_g)
                if dpoints.ptr is not None:
                    place = b * weights.sample + a * weights.anchor + p * weights.point + v * weights.camera
                    place += level * weights.level + place_g * weights.group
                    w = tl.load(weights.ptr + place, mask=mask_g, other=0.0).to(ACC_DTYPE)  # [G]
                    by_share = tl.sum(tl.where(inside[:, None], dot * w[None, :], 0.0), axis=1)  # [4]
                    dx += maps[level].width * tl.sum(sign_x * share_y * by_share, axis=0)
                    dy += maps[level].height * tl.sum(sign_y * share_x * by_share, axis=0)
        if dpoints.ptr is not None:
            pair = _pairs(dpoints, b, a, e, cameras)
            tl.store(pair, dx)
            tl.store(pair + dpoints.axis, dy)


@triton.jit
def deformable_aggregation_keys(
    points, visible, sizes, keys_ptr,
    anchors, samples, cameras, points_in_all, nowhere,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each level and point the number of the cell at its top left, keys (LEVELS, B·A·P·V); `nowhere` for those that
    do not count. A map has a row and a column of such cells more than it has cells, for they may lie outside."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < points_in_all
    anchor, e = offs // samples, offs % samples
    b, a = anchor // anchors, anchor % anchors
    v = e % cameras
    counts, x, y = _counting(points, visible, b, a, e, mask, cameras)
    for level in tl.static_range(LEVELS):
        height, width, first = sizes[level][0], sizes[level][1], sizes[level][2]
        column = tl.floor(tl.where(counts, x, 0.5) * width - 0.5).to(tl.int64) + 1
        row = tl.floor(tl.where(counts, y, 0.5) * height - 0.5).to(tl.int64) + 1
        cell = ((b * cameras + v) * (height + 1) + row) * (width + 1) + column
        tl.store(keys_ptr + level * points_in_all + offs, tl.where(counts, first + cell, nowhere), mask=mask)


@triton.jit
def deformable_aggregation_backward_maps(
    grad, points, weights, order_ptr, starts_ptr, dmaps,
    level, first_key, first_place, anchors, samples, cameras, channels, per_group,
    ACC_DTYPE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of one cell: of the points whose top left cell is it, its left, its upper or its upper left one."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    block_c, cell = pid % blocks_c, pid // blocks_c
    column, row = cell % dmaps.width, cell // dmaps.width % dmaps.height
    view = (cell // dmaps.width // dmaps.height).to(tl.int64)
    b, v = view // cameras, view % cameras
    offs_c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    offs_g = (offs_c // per_group).to(tl.int64)
    offs_c = offs_c.to(tl.int64)

    above = first_key + (view * (dmaps.height + 1) + row) * (dmaps.width + 1) + column
    below = above + dmaps.width + 1
    start_above, start_below = tl.load(starts_ptr + above), tl.load(starts_ptr + below)
    count_above = tl.load(starts_ptr + above + 2) - start_above
    count = count_above + tl.load(starts_ptr + below + 2) - start_below
    acc = tl.zeros([BLOCK_E, BLOCK_C], dtype=ACC_DTYPE)
    for start_e in range(0, count, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        place = tl.where(offs_e < count_above, start_above + offs_e, start_below + offs_e - count_above)
        n = tl.load(order_ptr + place, mask=mask_e, other=0) - first_place  # in (B, A, P, V)
        a, p = n // samples % anchors, n % samples // cameras
        pair = points.ptr + b * points.sample + a * points.anchor + p * points.point + v * points.camera
        x = tl.load(pair, mask=mask_e, other=0.0) * dmaps.width - 0.5
        y = tl.load(pair + points.axis, mask=mask_e, other=0.0) * dmaps.height - 0.5
        share = tl.maximum(1 - tl.abs(x - column), 0.0) * tl.maximum(1 - tl.abs(y - row), 0.0)  # [E]
        mask = mask_e[:, None] & mask_c[None, :]
        rows = grad.ptr + b * grad.sample + a * grad.anchor
        dout = tl.load(rows[:, None] + offs_c[None, :] * grad.channel, mask=mask, other=0.0).to(ACC_DTYPE)  # [E, C]
        weight = weights.ptr + b * weights.sample + a * weights.anchor + p * weights.point + v * weights.camera
        weight += level * weights.level
        w = tl.load(weight[:, None] + offs_g[None, :] * weights.group, mask=mask, other=0.0).to(ACC_DTYPE)  # [E, C]
        acc += share.to(ACC_DTYPE)[:, None] * w * dout
    target = dmaps.ptr + b * dmaps.sample + v * dmaps.camera + row.to(tl.int64) * dmaps.row + column * dmaps.column
    tl.store(target + offs_c * dmaps.channel, tl.sum(acc, axis=0), mask=mask_c)


def _maps(tensor):
    return Maps(tensor, *tensor.stride(), *tensor.shape[3:])


def _visible(visible):
    return Visible(None, 0, 0) if visible is None else Visible(visible, *visible.stride())


def _channels_last(feature_maps):
    return all(maps.stride(2) == 1 for maps in feature_maps)


def _with_cells(feature_maps):
    """Places of the levels that have cells. A level without any contributes nothing."""
    return [level for level, maps in enumerate(feature_maps) if maps.numel() > 0]


def launch_forward(feature_maps, points, weights, visible):
    batch, anchors, per_anchor, cameras = points.shape[:4]
    channels, groups = feature_maps[0].shape[2], weights.shape[5]
    dtype = accumulator_dtype(feature_maps[0].dtype, points.dtype, weights.dtype)
    samples = per_anchor * cameras
    architecture, itemsize = launch.architecture(points.device), feature_maps[0].element_size()
    config = configs.forward(
        architecture, itemsize, batch * anchors, samples, channels, _channels_last(feature_maps)
    )  # fmt: skip
    shape = (config["SPLITS"], batch, anchors, channels)
    whole = config["SPLITS"] == 1
    levels = _with_cells(feature_maps)
    if not levels or samples == 0 or 0 in shape:
        return feature_maps[0].new_zeros(shape[1:])
    out = torch.empty(shape, dtype=feature_maps[0].dtype if whole else dtype, device=points.device)
    by_level = weights[..., levels, :] if len(levels) < len(feature_maps) else weights
    programs = batch * anchors * config["SPLITS"] * triton.cdiv(channels, config["BLOCK_C"])
    enqueue(
        deformable_aggregation_forward, programs,
        tuple(_maps(feature_maps[level]) for level in levels),
        Points(points, *points.stride()), Weights(by_level, *by_level.stride()), _visible(visible), out,
        batch, anchors, samples, cameras, channels, channels // groups,
        LEVELS=len(levels), ACC_DTYPE=triton_dtype(dtype), **config,
    )  # fmt: skip
    return out[0] if whole else out.sum(0).to(feature_maps[0].dtype)


def launch_backward(grad, feature_maps, points, weights, visible, needs_grad):
    dtype = accumulator_dtype(feature_maps[0].dtype, points.dtype, weights.dtype)
    levels = _with_cells(feature_maps)
    something = levels and grad.numel() > 0 and points.numel() > 0
    *of_maps, of_points, of_weights = needs_grad
    dpoints = torch.zeros_like(points, memory_format=torch.contiguous_format) if of_points else None
    dweights = torch.zeros_like(weights, memory_format=torch.contiguous_format) if of_weights else None
    allocate = torch.empty_like if something else torch.zeros_like
    dmaps = [allocate(maps) if needed else None for maps, needed in zip(feature_maps, of_maps)]
    if something and (of_points or of_weights):
        _launch_backward_samples(grad, feature_maps, points, weights, visible, dpoints, dweights, levels, dtype)
    wanted = [level for level in levels if of_maps[level]]
    if something and wanted:
        _launch_backward_maps(grad, feature_maps, points, weights, visible, dmaps, wanted, dtype)
    return [*dmaps, dpoints, dweights]


def _launch_backward_samples(grad, feature_maps, points, weights, visible, dpoints, dweights, levels, dtype):
    batch, anchors, per_anchor, cameras = points.shape[:4]
    groups = weights.shape[5]
    per_group = grad.shape[2] // groups
    architecture, itemsize = launch.architecture(grad.device), feature_maps[0].element_size()
    config = configs.backward_samples(architecture, itemsize, groups, per_group, _channels_last(feature_maps))
    pick = levels if len(levels) < len(feature_maps) else slice(None)
    by_level = weights[..., pick, :]
    dby_level = None if dweights is None else torch.zeros_like(by_level) if pick is levels else dweights
    programs = batch * anchors * triton.cdiv(per_anchor * cameras, config["BLOCK_E"])
    enqueue(
        deformable_aggregation_backward_samples, programs,
        Rows(grad, *grad.stride()), tuple(_maps(feature_maps[level]) for level in levels),
        Points(points, *points.stride()), Weights(by_level, *by_level.stride()), _visible(visible),
        Points(None, 0, 0, 0, 0, 0) if dpoints is None else Points(dpoints, *dpoints.stride()),
        Weights(None, 0, 0, 0, 0, 0, 0) if dweights is None else Weights(dby_level, *dby_level.stride()),
        anchors, per_anchor * cameras, cameras, groups, per_group,
        LEVELS=len(levels), ACC_DTYPE=triton_dtype(dtype), **config,
    )  # fmt: skip
    if dweights is not None and pick is levels:
        dweights[..., levels, :] = dby_level


def _launch_backward_maps(grad, feature_maps, points, weights, visible, dmaps, levels, dtype):
    batch, anchors, per_anchor, cameras = points.shape[:4]
    samples, count = per_anchor * cameras, points[..., 0].numel()
    views, sizes, nowhere = batch * cameras, [], 0
    for level in levels:
        height, width = feature_maps[level].shape[3:]
        sizes.append((height, width, nowhere))
        nowhere += views * (height + 1) * (width + 1)
    index = torch.int32 if nowhere < 2**31 else torch.int64
    keys = torch.empty(len(levels) * count, dtype=index, device=points.device)
    enqueue(
        deformable_aggregation_keys, triton.cdiv(count, 256),
        Points(points, *points.stride()), _visible(visible), tuple(sizes), keys,
        anchors, samples, cameras, count, nowhere, LEVELS=len(levels), BLOCK=256,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    # One start more than there are keys, where the last one's run ends.
    starts = torch.searchsorted(keys, torch.arange(nowhere + 1, dtype=index, device=keys.device))
    channels, groups = grad.shape[2], weights.shape[5]
    config = configs.backward_maps(launch.architecture(grad.device), channels)
    for place, (level, (height, width, first)) in enumerate(zip(levels, sizes)):
        programs = views * height * width * triton.cdiv(channels, config["BLOCK_C"])
        enqueue(
            deformable_aggregation_backward_maps, programs,
            Rows(grad, *grad.stride()), Points(points, *points.stride()), Weights(weights, *weights.stride()),
            order, starts, _maps(dmaps[level]),
            level, first, place * count, anchors, samples, cameras, channels, channels // groups,
            ACC_DTYPE=triton_dtype(dtype), **config,
        )  # fmt: skip
