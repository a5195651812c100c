"""Triton backend: a program owns BLOCK_P cells of one map and walks the trajectory once."""

import torch
import triton
import triton.language as tl

from ..runtime.launch import strided
from . import configs


@triton.jit
def trajectory_importance_forward(points, valid, out_ptr, height, width, steps, exponent_scale, BLOCK_P: tl.constexpr):
    tiles = tl.cdiv(height * width, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    offs_p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < height * width
    dtype: tl.constexpr = points[0].dtype.element_ty
    x = (offs_p % width).to(dtype)
    y = (offs_p // width).to(dtype)

    nearest = tl.full([BLOCK_P], float("inf"), dtype)
    start_x = tl.full([], 0.0, dtype)
    start_y = tl.full([], 0.0, dtype)
    started = False
    for step in range(steps):
        point_ptr = points[0] + n * points[1] + step * points[2]
        end_x = tl.load(point_ptr)
        end_y = tl.load(point_ptr + points[3])
        # x - x is 0 unless x is NaN or infinite
        finite = (end_x - end_x == 0) & (end_y - end_y == 0)
        counts = (tl.load(valid[0] + n * valid[1] + step * valid[2]) != 0) & finite
        start_x = tl.where(started, start_x, end_x)
        start_y = tl.where(started, start_y, end_y)
        along_x = end_x - start_x
        along_y = end_y - start_y
        length = along_x * along_x + along_y * along_y
        fraction = ((x - start_x) * along_x + (y - start_y) * along_y) / tl.where(length > 0, length, 1.0)
        fraction = tl.minimum(tl.maximum(fraction, 0.0), 1.0)
        to_x = x - start_x - fraction * along_x
        to_y = y - start_y - fraction * along_y
        nearest = tl.where(counts, tl.minimum(nearest, to_x * to_x + to_y * to_y), nearest)
        start_x = tl.where(counts, end_x, start_x)
        start_y = tl.where(counts, end_y, start_y)
        started = started | counts
    importance = tl.exp(nearest.to(tl.float32) * exponent_scale)
    tl.store(out_ptr + n * (height * width) + offs_p, importance, mask=mask_p)


def launch_forward(points, valid, height, width, sigma):
    n, steps, _ = points.shape
    out = torch.empty((n, height, width), dtype=torch.float32, device=points.device)
    if out.numel():
        config = configs.tile(height * width)
        trajectory_importance_forward[(n * triton.cdiv(height * width, config["BLOCK_P"]),)](
            strided(points), strided(valid), out, height, width, steps, -0.5 / sigma**2, **config
        )
    return out
