"""Every operation with small inputs: what the tests hold to one suite of properties, and the benchmark's list of them.

A row is a public function, the table of its tensors (who gets gradients, who follows autocast) and a recipe for its
arguments in any dtype and size. Adding an operation adds its folder in kernels/ and one row here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import kernels
from ..kernels import TokenMap
from ..kernels.bias_softmax.api import ARGUMENTS as BIAS_SOFTMAX
from ..kernels.cross_camera_attention.api import ARGUMENTS as CROSS_CAMERA_ATTENTION
from ..kernels.deformable_aggregation.api import ARGUMENTS as DEFORMABLE_AGGREGATION
from ..kernels.gated_fusion.api import ARGUMENTS as GATED_FUSION
from ..kernels.multi_depth_warp.api import ARGUMENTS as MULTI_DEPTH_WARP
from ..kernels.multi_depth_warp.api import BEV_ARGUMENTS as BEV_WARP
from ..kernels.runtime.arguments import Arguments
from ..kernels.trajectory_importance.api import ARGUMENTS as TRAJECTORY_IMPORTANCE
from ..kernels.window_attention.api import ARGUMENTS as WINDOW_ATTENTION
from ..kernels.window_bias_attention.api import ARGUMENTS as WINDOW_BIAS_ATTENTION

Sizes = Mapping[str, Any]


class Random:
    """Seeded tensors on a device. What is geometry is float32, float64 beside float64, whatever the dtype."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0):
        self.dtype, self.device = dtype, device
        self.geometry = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def chance(self, probability: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self._generator) < probability).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator).to(self.device)


@dataclass(frozen=True)
class Example:
    """One operation.

    function: the public function; its first result is the differentiable one.
    table: its tensors.
    recipe: from a `Random` and sizes to the arguments by name, every optional one among them.
    sizes: several tiles of each kernel. tiny: few enough numbers to differentiate by differences. other: nearly as few,
        each different where a compiled graph may change. empty: changes of `sizes` that leave nothing to compute.
    """

    function: Callable
    table: Arguments
    recipe: Callable[..., dict[str, Any]]
    sizes: Sizes
    tiny: Sizes
    other: Sizes
    empty: tuple[Sizes, ...]

    def make(self, dtype: torch.dtype, device: str = "cpu", sizes: Sizes | None = None, seed: int = 0):
        """Returns the arguments of one call."""
        return self.recipe(Random(dtype, device, seed), **(self.sizes if sizes is None else sizes))


def _warp(new, sources, targets, channels, source, size, depths):
    """Cameras that moved, offsets that reach over the border, the last target half behind its camera."""
    projection = torch.eye(3, 4, dtype=new.geometry, device=new.device).repeat(targets, 1, 1)
    projection += 0.02 * new.normal(targets, 3, 4, dtype=new.geometry)
    projection[:, 2] = torch.tensor([0.003, -0.002, 1, 0.5])
    projection[-1:, 2] = torch.tensor([0.2, 0, -0.5, 0.5])
    return dict(
        features=new.normal(sources, channels, *source),
        projection=projection,
        depths=new.uniform(targets, depths, dtype=new.geometry) * 20 + 10,
        weights=new.normal(targets, depths, *size),
        offsets=2 * new.normal(targets, depths, *size, 2, dtype=new.geometry),
        source_index=new.integers(0, sources, targets),
        output_size=size,
    )


def _warp_of_hypotheses(new, sources, targets, channels, source, size, depths):
    """As `_warp`, each hypothesis with a projection and a map of its own, or none."""
    arguments = _warp(new, sources, targets, channels, source, size, depths)
    turns = 0.02 * new.normal(targets, depths, 3, 4, dtype=new.geometry)
    turns[:, :, 2] = 0
    projection = arguments["projection"][:, None] + turns
    return {**arguments, "projection": projection, "source_index": new.integers(-1, sources, targets, depths)}


def _bev_warp(new, sources, targets, channels, source, size):
    """Turns of a few degrees and shifts of a few cells."""
    transform = torch.eye(2, 3, dtype=new.geometry, device=new.device).repeat(targets, 1, 1)
    transform += 0.1 * new.normal(targets, 2, 3, dtype=new.geometry)
    features = new.normal(sources, channels, *source)
    index = new.integers(0, sources, targets)
    return dict(features=features, transform=transform, source_index=index, output_size=size)


def _cross_camera_attention(new, queries, length_q, heads, dim, blocks, length_k, entries):
    """A table with entries of none, and every third key or so masked."""
    return dict(
        query=new.normal(queries, length_q, heads, dim),
        key=new.normal(blocks, length_k, heads, dim),
        value=new.normal(blocks, length_k, heads, dim),
        block_table=new.integers(-1, blocks, queries, entries),
        key_mask=new.chance(0.7, blocks, length_k),
    )


def _window_attention(new, batch, length, heads, dim, maps):
    """Centres on the maps, round them and, every fifth, nowhere."""
    maps = tuple(TokenMap(*token_map) for token_map in maps)
    keys = sum(token_map.height * token_map.width for token_map in maps)
    extent = torch.tensor([[token_map.width, token_map.height] for token_map in maps], device=new.device)
    centers = new.uniform(batch, length, len(maps), 2, dtype=new.geometry) * (extent + 8) - 4
    centers[:, 2::5] = float("nan")
    return dict(
        query=new.normal(batch, length, heads, dim),
        key=new.normal(batch, keys, heads, dim),
        value=new.normal(batch, keys, heads, dim),
        centers=centers,
        maps=maps,
    )


def _window_bias_attention(new, batch, length, heads, dim, maps):
    arguments = _window_attention(new, batch, length, heads, dim, maps)
    weights = new.normal(batch, length, len(maps), dtype=new.geometry)
    bias_scale = torch.tensor(2.5, dtype=new.geometry, device=new.device)
    return {**arguments, "weights": weights, "bias_scale": bias_scale}


def _bias_softmax(new, shape, bias_shape):
    """A bias that is broadcast, some of it beyond its limit."""
    scale = torch.tensor(1.5, dtype=new.geometry, device=new.device)
    limits = dict(min_scale=0.5, max_scale=5.0, max_bias=2.0)
    return dict(scores=new.normal(*shape), bias=new.normal(*bias_shape), bias_scale=scale, **limits)


def _gated_fusion(new, images, channels, size):
    """A fine branch, and every third image or so present."""
    image = partial(new.normal, images, channels, *size)
    return dict(
        original=image(),
        completed=image(),
        gate_logits=new.normal(images, 1, *size),
        fine=image(),
        importance=new.uniform(images, 1, *size),
        missing=torch.arange(images, device=new.device) % 3 != 1,
    )


def _trajectory_importance(new, trajectories, steps, size):
    """Wandering over the map and beyond, every fifth point or so not valid."""
    points = new.uniform(trajectories, steps, 2, dtype=new.geometry) * 14 - 1
    return dict(points=points, valid=new.chance(0.8, trajectories, steps), size=size, sigma=1.7)


def _deformable_aggregation(new, batch, anchors, points, cameras, channels, groups, sizes):
    """Points in and out of the images, a camera that is not visible. No point is near a cell's border."""
    places = ((new.uniform(batch, anchors, points, cameras, 2, dtype=new.geometry) * 1.3 - 0.15) * 256).floor() + 0.5
    maps = {f"feature_maps[{level}]": new.normal(batch, cameras, channels, *size) for level, size in enumerate(sizes)}
    visible = torch.ones(batch, cameras, dtype=torch.bool, device=new.device)
    visible[:1, 1:2] = False
    weights = new.normal(batch, anchors, points, cameras, len(sizes), groups)
    return dict(**maps, points=places / 256, weights=weights, visible=visible)


def _of_two_levels(points, weights, visible=None, backend=None, **maps):
    levels = [maps.pop("feature_maps[0]"), maps.pop("feature_maps[1]")]
    return kernels.deformable_aggregation(levels, points, weights, visible=visible, backend=backend, **maps)


_of_two_levels.__module__ = kernels.deformable_aggregation.__module__

_WARP = dict(sources=2, targets=2, channels=17, source=(7, 13), size=(5, 7), depths=2)
_BEV = dict(sources=3, targets=2, channels=17, source=(7, 13), size=(5, 9))
_ATTENTION = dict(queries=2, length_q=18, heads=2, dim=24, blocks=3, length_k=19, entries=3)
_WINDOW = dict(batch=2, length=19, heads=2, dim=16, maps=((9, 11, 5), (5, 7, 4), (3, 2, 8)))
_WINDOWS = dict(batch=2, length=6, heads=2, dim=24, maps=((5, 7, 5), (3, 2, 8)))
_SOFTMAX = dict(shape=(2, 3, 5, 37), bias_shape=(2, 1, 5, 37))
_FUSION = dict(images=4, channels=19, size=(5, 7))
_AGGREGATION = dict(batch=2, anchors=3, points=3, cameras=2, channels=12, groups=3, sizes=((2, 3), (1, 2)))
_TRAJECTORY = dict(trajectories=4, steps=5, size=(11, 13))

EXAMPLES = {
    "multi_depth_warp": Example(
        kernels.multi_depth_warp, MULTI_DEPTH_WARP, _warp, _WARP,
        tiny=dict(sources=2, targets=2, channels=2, source=(3, 4), size=(2, 3), depths=2),
        other=dict(sources=3, targets=4, channels=3, source=(4, 5), size=(4, 3), depths=3),
        empty=(dict(targets=0), dict(channels=0), dict(source=(0, 5)), dict(size=(0, 3)), dict(size=(2, 0))),
    ),
    "multi_depth_warp of hypotheses": Example(
        kernels.multi_depth_warp, MULTI_DEPTH_WARP, _warp_of_hypotheses, {**_WARP, "sources": 3, "depths": 3},
        tiny=dict(sources=2, targets=2, channels=2, source=(3, 4), size=(2, 3), depths=3),
        other=dict(sources=3, targets=4, channels=3, source=(4, 5), size=(4, 3), depths=2),
        empty=(dict(sources=0), dict(targets=0), dict(channels=0), dict(source=(0, 5)), dict(size=(0, 3))),
    ),
    "bev_warp": Example(
        kernels.bev_warp, BEV_WARP, _bev_warp, _BEV,
        tiny=dict(sources=2, targets=2, channels=2, source=(3, 4), size=(2, 3)),
        other=dict(sources=3, targets=4, channels=3, source=(4, 5), size=(4, 3)),
        empty=(dict(targets=0), dict(channels=0), dict(source=(0, 5)), dict(size=(0, 3))),
    ),
    "cross_camera_attention": Example(
        kernels.cross_camera_attention, CROSS_CAMERA_ATTENTION, _cross_camera_attention, _ATTENTION,
        tiny=dict(queries=2, length_q=3, heads=2, dim=16, blocks=3, length_k=2, entries=3),
        other=dict(queries=3, length_q=4, heads=2, dim=16, blocks=2, length_k=5, entries=2),
        empty=(dict(queries=0), dict(length_q=0), dict(heads=0), dict(blocks=0), dict(entries=0)),
    ),
    "window_attention": Example(
        kernels.window_attention, WINDOW_ATTENTION, _window_attention, _WINDOWS,
        tiny={**_WINDOWS, "length": 3, "dim": 16, "maps": ((3, 4, 3), (1, 2, 8))},
        other={**_WINDOWS, "batch": 1, "length": 4},
        empty=(dict(batch=0), dict(length=0), dict(heads=0)),
    ),
    "window_bias_attention": Example(
        kernels.window_bias_attention, WINDOW_BIAS_ATTENTION, _window_bias_attention, _WINDOW,
        tiny=dict(batch=2, length=3, heads=2, dim=16, maps=((3, 4, 2), (1, 2, 3))),
        other=dict(batch=3, length=4, heads=2, dim=16, maps=((3, 4, 2), (1, 2, 3))),
        empty=(dict(batch=0), dict(length=0), dict(heads=0)),
    ),
    "bias_softmax": Example(
        kernels.bias_softmax, BIAS_SOFTMAX, _bias_softmax, _SOFTMAX,
        tiny=dict(shape=(2, 2, 3), bias_shape=(2, 3)),
        other=dict(shape=(3, 4, 5), bias_shape=(4, 5)),
        empty=(
            dict(shape=(0, 4), bias_shape=(4,)), dict(shape=(3, 0), bias_shape=(3, 0)),
            dict(shape=(2, 0, 4), bias_shape=(2, 1, 4)),
        ),
    ),
    "gated_fusion": Example(
        kernels.gated_fusion, GATED_FUSION, _gated_fusion, _FUSION,
        tiny=dict(images=2, channels=3, size=(2, 4)),
        other=dict(images=3, channels=6, size=(4, 3)),
        empty=(dict(images=0), dict(channels=0), dict(size=(0, 5)), dict(size=(4, 0))),
    ),
    "deformable_aggregation": Example(
        _of_two_levels, DEFORMABLE_AGGREGATION.of_list(2), _deformable_aggregation, _AGGREGATION,
        tiny=dict(batch=2, anchors=1, points=3, cameras=2, channels=2, groups=1, sizes=((2, 3), (1, 2))),
        other=dict(batch=3, anchors=1, points=2, cameras=3, channels=3, groups=1, sizes=((3, 2), (1, 3))),
        empty=(
            dict(batch=0), dict(anchors=0), dict(points=0), dict(cameras=0), dict(channels=0),
            dict(sizes=((0, 4), (3, 0))),
        ),
    ),
    "trajectory_importance": Example(
        kernels.trajectory_importance, TRAJECTORY_IMPORTANCE, _trajectory_importance, _TRAJECTORY,
        tiny=dict(trajectories=2, steps=3, size=(3, 4)),
        other=dict(trajectories=3, steps=4, size=(5, 3)),
        empty=(dict(trajectories=0), dict(steps=0), dict(size=(0, 5))),
    ),
}  # fmt: skip
