"""multi_depth_warp written in CUDA C++ and started through CuPy: what a careful person would write by hand.

A warp owns one target cell; its lanes share the geometry and walk the channels, which are dense in memory. The
backward pass scatters with atomics, as PyTorch's own grid_sample does.
"""

import functools

import numpy as np
import torch

from .operation import Inputs, require_cuda, require_package
from .workload import Unavailable

CELLS_PER_BLOCK, LANES = 8, 32
_STORAGE = {torch.float32: "float", torch.bfloat16: "unsigned short"}

SOURCE = r"""
__device__ inline float load(const float* p) { return *p; }
__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline float load(const unsigned short* p) { return __uint_as_float((unsigned)*p << 16); }
__device__ inline void store(unsigned short* p, float x) {  // rounds to nearest even
    unsigned bits = __float_as_uint(x);
    *p = (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Corners {
    long long row[4];  // first channel of the source cell, -1 = outside
    float share[4], along_x[4], along_y[4];
};

// Where target cell (u, v) is seen at a depth; false where it is not.
__device__ inline bool locate(const float* P, float depth, float u, float v, float ox, float oy, int source,
                              int height, int width, int channels, Corners* corners) {
    float p0 = (P[0] * u + P[1] * v + P[2]) * depth + P[3];
    float p1 = (P[4] * u + P[5] * v + P[6]) * depth + P[7];
    float p2 = (P[8] * u + P[9] * v + P[10]) * depth + P[11];
    if (!(p2 > 0.1f)) return false;
    float x = p0 / p2 + ox, y = p1 / p2 + oy;
    if (!(x > -1.0f && x < (float)width && y > -1.0f && y < (float)height)) return false;
    int left = (int)floorf(x), top = (int)floorf(y);
    float fx = x - left, fy = y - top;
    for (int k = 0; k < 4; ++k) {
        int column = left + (k & 1), row = top + (k >> 1);
        float wx = (k & 1) ? fx : 1.0f - fx, wy = (k >> 1) ? fy : 1.0f - fy;
        bool inside = column >= 0 && column < width && row >= 0 && row < height;
        corners->row[k] = inside ? (((long long)source * height + row) * width + column) * channels : -1;
        corners->share[k] = wx * wy;
        corners->along_x[k] = (k & 1) ? wy : -wy;
        corners->along_y[k] = (k >> 1) ? wx : -wx;
    }
    return true;
}

extern "C" __global__ void warp_forward(
    const STORAGE* features, const float* projection, const float* depths, const float* offsets,
    const long long* source_index, STORAGE* warped, float* coverage,
    long long cells, int planes, int channels, int height, int width) {
    long long cell = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (cell >= cells) return;
    int lane = threadIdx.x % LANES, u = cell % width, v = (cell / width) % height;
    long long n = cell / ((long long)width * height);
    float covered = 0.0f;
    for (int c = lane; c < channels; c += LANES) {
        float sum = 0.0f;
        covered = 0.0f;
        for (int d = 0; d < planes; ++d) {
            Corners corners;
            if (!locate(projection + 12 * n, depths[d], u, v, offsets[2 * cell], offsets[2 * cell + 1],
                        (int)source_index[n], height, width, channels, &corners)) continue;
            for (int k = 0; k < 4; ++k) {
                if (corners.row[k] < 0) continue;
                sum += corners.share[k] * load(features + corners.row[k] + c);
                covered += corners.share[k];
            }
        }
        store(warped + cell * channels + c, sum / planes);
    }
    if (lane == 0) coverage[cell] = covered / planes;
}

extern "C" __global__ void warp_backward(
    const STORAGE* grad, const STORAGE* features, const float* projection, const float* depths, const float* offsets,
    const long long* source_index, float* dfeatures, float* doffsets,
    long long cells, int planes, int channels, int height, int width) {
    long long cell = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (cell >= cells) return;
    int lane = threadIdx.x % LANES, u = cell % width, v = (cell / width) % height;
    long long n = cell / ((long long)width * height);
    float dx = 0.0f, dy = 0.0f;
    for (int d = 0; d < planes; ++d) {
        Corners corners;
        if (!locate(projection + 12 * n, depths[d], u, v, offsets[2 * cell], offsets[2 * cell + 1],
                    (int)source_index[n], height, width, channels, &corners)) continue;
        for (int c = lane; c < channels; c += LANES) {
            float g = load(grad + cell * channels + c) / planes;
            for (int k = 0; k < 4; ++k) {
                if (corners.row[k] < 0) continue;
                float f = load(features + corners.row[k] + c);
                atomicAdd(dfeatures + corners.row[k] + c, corners.share[k] * g);
                dx += corners.along_x[k] * f * g;
                dy += corners.along_y[k] * f * g;
            }
        }
    }
    for (int step = LANES / 2; step > 0; step /= 2) {
        dx += __shfl_down_sync(0xffffffffu, dx, step);
        dy += __shfl_down_sync(0xffffffffu, dy, step);
    }
    if (lane == 0) {
        doffsets[2 * cell] = dx;
        doffsets[2 * cell + 1] = dy;
    }
}
"""


def cuda_warp(inputs: Inputs):
    """The peer: forward and backward as one differentiable function."""
    require_package("cupy")
    import cupy

    if not cupy.is_available():
        raise Unavailable("CuPy finds no CUDA device")
    require_cuda(inputs)
    if inputs.dtype not in _STORAGE:
        raise Unavailable("the CUDA C++ kernel is written for float32 and bfloat16")
    return _CudaWarp.apply


@functools.cache
def _kernels(dtype):
    import cupy

    options = (f"-DSTORAGE={_STORAGE[dtype]}", f"-DLANES={LANES}")
    module = cupy.RawModule(code=SOURCE, options=options)
    try:
        return module.get_function("warp_forward"), module.get_function("warp_backward")
    except cupy.cuda.compiler.CompileException as error:
        raise Unavailable(f"NVRTC cannot compile the kernel: {error}") from error


def _launch(kernel, tensors, sizes):
    import cupy

    cells, *others = sizes
    arguments = [t.data_ptr() for t in tensors] + [np.int64(cells), *map(np.int32, others)]
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        kernel((-(-cells // CELLS_PER_BLOCK),), (CELLS_PER_BLOCK * LANES,), tuple(arguments))


class _CudaWarp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, projection, depths, offsets, source_index):
        channels, height, width = features.shape[1:]
        features = features.contiguous(memory_format=torch.channels_last)
        sizes = (len(projection) * height * width, len(depths), channels, height, width)
        geometry = (projection, depths, offsets, source_index)
        shape = (len(projection), channels, height, width)
        like = dict(dtype=features.dtype, device=features.device)
        warped = torch.empty(shape, memory_format=torch.channels_last, **like)
        coverage = torch.empty(len(projection), height, width, device=features.device)
        _launch(_kernels(features.dtype)[0], (features, *geometry, warped, coverage), sizes)
        ctx.save_for_backward(features, *geometry)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(coverage)
        return warped, coverage

    @staticmethod
    def backward(ctx, grad, _):
        features, projection, depths, offsets, source_index = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dfeatures = torch.zeros_like(features, dtype=torch.float32)
        doffsets = torch.empty_like(offsets)
        geometry = (projection, depths, offsets, source_index)
        _launch(_kernels(features.dtype)[1], (grad, features, *geometry, dfeatures, doffsets), ctx.sizes)
        return dfeatures.to(features.dtype), None, None, doffsets, None
