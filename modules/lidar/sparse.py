"""Sparse 3-D convolution in plain PyTorch (Graham et al. 2018, submanifold sparse convolutional networks).

A convolution is a list of pairs for each kernel offset: which input row meets which output row. Forward and backward
gather the rows of one offset after the other, multiply, and add in that order. No output row stands twice in one
offset's pairs, so nothing is added atomically and results repeat bit for bit.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ...kernels.runtime.autocast import to_autocast_dtype
from ...kernels.runtime.checks import FLOAT_DTYPES, Shapes, check_dtype

Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # for each kernel offset: input rows, output rows


class SparseTensor:
    """Features at the active sites of a batch of grids.

    Args:
        features: (N, C) float.
        coordinates: (N, 4) int64: sample, z, y, x. Ascending in that order, none twice.
        spatial_shape: (Z, Y, X) of the grid.
        batch_size: number of samples; a sample may have no site.

    Raises:
        ValueError: a shape does not fit, or coordinates lie outside the grid, are out of order or repeat.
        TypeError: features are not floating point, or coordinates not int64.
    """

    def __init__(
        self,
        features: torch.Tensor,
        coordinates: torch.Tensor,
        spatial_shape: tuple[int, int, int],
        batch_size: int,
    ):
        shapes = Shapes("SparseTensor")
        shapes.bind("features", features, "N", "C")
        shapes.bind("coordinates", coordinates, "N", 4)
        check_dtype("SparseTensor", "features", features, FLOAT_DTYPES)
        check_dtype("SparseTensor", "coordinates", coordinates, (torch.int64,))
        self.features, self.coordinates = features, coordinates
        self.spatial_shape, self.batch_size = tuple(spatial_shape), batch_size
        limits = torch.tensor((batch_size, *self.spatial_shape), device=coordinates.device)
        if not ((coordinates >= 0) & (coordinates < limits)).all():
            grid = f"{batch_size} grids of {self.spatial_shape}"
            raise ValueError(f"SparseTensor: coordinates lie outside the grid, need (sample, z, y, x) within {grid}")
        sample, z, y, x = coordinates.unbind(1)
        depth, height, width = self.spatial_shape
        self.keys = ((sample * depth + z) * height + y) * width + x
        if not (self.keys[1:] > self.keys[:-1]).all():
            raise ValueError("SparseTensor: coordinates are out of order or repeat, need ascending (sample, z, y, x)")
        self._tables: dict[str, Pairs] = {}  # shared with every tensor on the same sites

    def with_features(self, features: torch.Tensor) -> "SparseTensor":
        """Other features (N, C') at the same sites."""
        other = copy.copy(self)
        other.features = features
        return other

    def neighbours(self) -> Pairs:
        """The pairs of a 3×3×3 submanifold convolution, found once for all tensors on these sites."""
        if "submanifold" not in self._tables:
            self._tables["submanifold"] = _submanifold_pairs(self)
        return self._tables["submanifold"]

    def dense(self) -> torch.Tensor:
        """(B, C, Z, Y, X), zero where no site is active."""
        shape = (self.batch_size, *self.spatial_shape)
        grid = self.features.new_zeros(math.prod(shape), self.features.shape[1])
        return grid.index_copy(0, self.keys, self.features).view(*shape, -1).movedim(-1, 1)


class SubmanifoldConv3d(nn.Module):
    """3×3×3 convolution without bias whose output sites are its input sites (Graham et al. 2018).

    Equals a dense convolution with padding 1, read at the active sites. Under autocast rows are multiplied in the
    autocast dtype; sums are float32 or wider. Gradients: features, weight.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = _weight((3, 3, 3), in_channels, out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """(N, in_channels) → (N, out_channels) on the same sites."""
        return x.with_features(_convolve("SubmanifoldConv3d", x.features, self.weight, x.neighbours(), len(x.keys)))


class SparseConv3d(nn.Module):
    """Strided convolution without bias; a site is active where any input site lies under the kernel.

    Equals a dense convolution, read at the active sites. Dtypes and gradients as in `SubmanifoldConv3d`.

    Args:
        in_channels, out_channels: C before and after.
        kernel_size, stride, padding: along (z, y, x).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (2, 2, 2),
        padding: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = _weight(kernel_size, in_channels, out_channels)

    def output_shape(self, spatial_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(Z, Y, X) after this layer."""
        sizes = zip(spatial_shape, self.kernel_size, self.stride, self.padding)
        shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        if min(shape) < 1:
            needed = f"at least the kernel {self.kernel_size} less twice the padding {self.padding}"
            raise ValueError(f"SparseConv3d: spatial_shape is {tuple(spatial_shape)}, needs {needed}")
        return shape

    def forward(self, x: SparseTensor) -> SparseTensor:
        """(N, in_channels) → (M, out_channels) on the sites that an input site reaches."""
        shape = self.output_shape(x.spatial_shape)
        inside, keys = _reach(x.coordinates, shape, self.kernel_size, self.stride, self.padding)
        keys, target = torch.unique(keys[inside], return_inverse=True)
        source, counts = inside.nonzero()[:, 1], inside.sum(1).tolist()
        pairs = list(zip(source.split(counts), target.split(counts)))
        features = _convolve("SparseConv3d", x.features, self.weight, pairs, len(keys))
        coordinates = torch.stack(torch.unravel_index(keys, (x.batch_size, *shape)), 1)
        return SparseTensor(features, coordinates, shape, x.batch_size)


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over rows of which there may be none or one: these have no variance and take the running statistics.

    eps and momentum are those of the LiDAR networks this follows (SECOND, Yan et al. 2018).
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, C) → (N, C)"""
        if len(rows) > 1:
            return super().forward(rows)
        return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SparseConvBlock(nn.Module):
    """A sparse convolution, batch norm and ReLU."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv, self.norm = conv, RowBatchNorm(conv.weight.shape[2])

    def forward(self, x: SparseTensor) -> SparseTensor:
        x = self.conv(x)
        return x.with_features(F.relu(self.norm(x.features)))


class SparseBasicBlock(nn.Module):
    """Two submanifold convolutions with a shortcut (He et al. 2016), as in CenterPoint (Yin et al. 2021)."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = SparseConvBlock(SubmanifoldConv3d(channels, channels))
        self.conv, self.norm = SubmanifoldConv3d(channels, channels), RowBatchNorm(channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.norm(self.conv(self.block(x)).features)
        return x.with_features(F.relu(out + x.features))


def _weight(kernel_size, in_channels, out_channels):
    """(offsets, C, C'), offsets row-major in (z, y, x), initialised as nn.Conv3d."""
    weight = torch.empty(math.prod(kernel_size), in_channels, out_channels)
    bound = (weight.shape[0] * in_channels) ** -0.5
    return nn.Parameter(nn.init.uniform_(weight, -bound, bound))


def _reach(coordinates, shape, kernel_size, stride, padding):
    """For each (kernel offset, input row): whether an output site meets the row there, and that site's key."""
    key, *places = coordinates.unbind(1)
    inside = torch.ones_like(key, dtype=torch.bool)
    for axis, (place, size, k, s, p) in enumerate(zip(places, shape, kernel_size, stride, padding)):
        across = [1, 1, 1, 1]
        across[axis] = k
        start = place + p - torch.arange(k, device=place.device).view(across)
        site = start.div(s, rounding_mode="floor")
        inside = inside & (site * s == start) & (site >= 0) & (site < size)
        key = key * size + site
    return inside.flatten(0, 2), key.flatten(0, 2)


def _submanifold_pairs(x):
    """The pairs at offset −d are those at d with input and output exchanged, so half are searched for."""
    inside, wanted = (half[:13] for half in _reach(x.coordinates, x.spatial_shape, (3, 3, 3), (1, 1, 1), (1, 1, 1)))
    offset, source = inside.nonzero().unbind(1)
    wanted = wanted[inside]
    target = torch.searchsorted(x.keys, wanted).clamp(max=len(x.keys) - 1)
    found = x.keys[target] == wanted
    counts = torch.bincount(offset[found], minlength=13).tolist()
    half = list(zip(source[found].split(counts), target[found].split(counts)))
    every = torch.arange(len(x.keys), device=x.keys.device)
    return half + [(every, every)] + [(target, source) for source, target in reversed(half)]


def _convolve(name, features, weight, pairs, sites):
    Shapes(name, in_channels=weight.shape[1]).bind("features", features, "N", "in_channels")
    return _Convolution.apply(to_autocast_dtype(features), to_autocast_dtype(weight), pairs, sites)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, pairs, sites):
        ctx.save_for_backward(features, weight)
        ctx.pairs = pairs
        return _multiply(features, weight, pairs, sites)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = [(target, source) for source, target in ctx.pairs]
            grad_features = _multiply(grad, weight.mT, transposed, len(features))
        if ctx.needs_input_grad[1]:
            rows = (features.index_select(0, source).mT @ grad.index_select(0, target) for source, target in ctx.pairs)
            grad_weight = torch.stack(list(rows))
        return grad_features, grad_weight, None, None


def _multiply(rows, weight, pairs, sites):
    """(sites, C'): each offset's rows times its matrix, added in the order of the offsets."""
    out = rows.new_zeros(sites, weight.shape[2], dtype=torch.promote_types(rows.dtype, torch.float32))
    for matrix, (source, target) in zip(weight, pairs):
        product = rows.index_select(0, source) @ matrix
        # a target stands in one offset's pairs once, so this needs no atomics, which index_add_ takes
        out.index_copy_(0, target, out.index_select(0, target) + product)
    return out.to(rows.dtype)
