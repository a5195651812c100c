"""Triton backend: a program owns BLOCK_P cells of one map and walks the trajectory once."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime.launch import Matrix, strided
from ..runtime.plans import enqueue
from . import configs

QUARTER = tl.constexpr(0.25)  # of everything, so that no difference of finite numbers overflows


class Points(NamedTuple):
    """(N, T, 2)."""

    ptr: Any
    trajectory: int
    step: int
    component: int


@triton.jit
def trajectory_importance_forward(
    points, valid, out_ptr, height, width, steps, sigma: tl.float64, BLOCK_P: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(height * width, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    offs_p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    mask_p = offs_p < height * width  # [BLOCK_P]
    dtype: tl.constexpr = points.ptr.dtype.element_ty
    x = QUARTER * (offs_p % width).to(dtype)  # [BLOCK_P]
    y = QUARTER * (offs_p // width).to(dtype)  # [BLOCK_P]
    scale = 1.0 / (QUARTER * tl.full([], sigma, dtype))

    nearest = tl.full([BLOCK_P], float("inf"), dtype)  # squared distance in sigmas
    start_x = tl.full([], 0.0, dtype)
    start_y = tl.full([], 0.0, dtype)
    started = False
    for step in range(steps):
        point_ptr = points.ptr + n * points.trajectory + step * points.step
        end_x = QUARTER * tl.load(point_ptr)
        end_y = QUARTER * tl.load(point_ptr + points.component)
        # x - x is 0 unless x is NaN or infinite
        finite = (end_x - end_x == 0) & (end_y - end_y == 0)
        counts = (tl.load(valid.ptr + n * valid.row + step * valid.column) != 0) & finite
        start_x = tl.where(started, start_x, end_x)
        start_y = tl.where(started, start_y, end_y)
        reach = tl.maximum(tl.abs(end_x - start_x), tl.abs(end_y - start_y))
        direction_x = (end_x - start_x) / tl.where(reach > 0, reach, 1.0)
        direction_y = (end_y - start_y) / tl.where(reach > 0, reach, 1.0)
        squared_length = direction_x * direction_x + direction_y * direction_y
        along = (x - start_x) * direction_x + (y - start_y) * direction_y  # [BLOCK_P]
        along = along / tl.where(squared_length > 0, squared_length, 1.0)
        along = tl.minimum(tl.maximum(along, 0.0), reach)
        away_x = (x - start_x - along * direction_x) * scale  # [BLOCK_P]
        away_y = (y - start_y - along * direction_y) * scale  # [BLOCK_P]
        nearest = tl.where(counts, tl.minimum(nearest, away_x * away_x + away_y * away_y), nearest)
        start_x = tl.where(counts, end_x, start_x)
        start_y = tl.where(counts, end_y, start_y)
        started = started | counts
    importance = tl.exp((-0.5 * nearest).to(tl.float32))  # [BLOCK_P]
    tl.store(out_ptr + n * (height * width) + offs_p, importance, mask=mask_p)


def launch_forward(points, valid, height, width, sigma):
    n, steps, _ = points.shape
    out = torch.empty((n, height, width), dtype=torch.float32, device=points.device)
    if out.numel():
        config = configs.tile(height * width)
        enqueue(
            trajectory_importance_forward, n * triton.cdiv(height * width, config["BLOCK_P"]),
            strided(Points, points), strided(Matrix, valid), out, height, width, steps, sigma, **config,
        )  # fmt: skip
    return out
