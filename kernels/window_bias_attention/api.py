"""The public function."""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch

from ..runtime.autocast import to_autocast_dtype
from ..runtime.backends import choose_backend
from ..runtime.checks import (
    FLOAT_DTYPES,
    Shapes,
    check_dtype,
    check_geometry_dtype,
    check_no_grad,
    check_same_device,
)
from ..runtime.nvtx import annotate

NAME = "window_bias_attention"
MIN_DIM, MAX_DIM = 16, 128


class TokenMap(NamedTuple):
    """A map whose cells are key tokens, row after row, and the side of the square window of cells that is biased."""

    height: int
    width: int
    window: int


def window_bias_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    centers: torch.Tensor,
    weights: torch.Tensor,
    bias_scale: torch.Tensor,
    *,
    maps: Sequence[TokenMap],
    min_scale: float = 0.5,
    max_scale: float = 5.0,
    max_bias: float = 5.0,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention over the tokens of several maps, biased in a window round each query's place on each map.

    `softmax(scale · query · keyᵀ + bias) · value`. With s = clamp(bias_scale, min_scale, max_scale) and, per axis,
    left = floor(center + 0.5) − window // 2, the bias of query i for the token at (x, y) of map m is
    clamp(s · weights[b, i, m], −max_bias, max_bias) where left ≤ (x, y) < left + window on both axes, and 0 elsewhere.
    A window may lie over the border or off the map. The clamps pass gradients as `torch.clamp` does, limits included.

    Neither scores nor bias is stored, forward or backward; memory does not grow with queries × keys. Computed in
    float32 (float64 for float64); the Triton backend multiplies operands in their own dtype, float32 as tf32 unless
    `torch.get_float32_matmul_precision()` is "highest". Under autocast query, key and value are cast to the autocast
    dtype, float64 excepted, as scaled_dot_product_attention does. Results are bitwise repeatable.

    Args:
        query: (B, Lq, heads, dim), 16 ≤ dim ≤ 128. Gets gradients.
        key: (B, Lk, heads, dim) in `query`'s dtype, the tokens of all maps one after another. Gets gradients.
        value: (B, Lk, heads, dim) in `query`'s dtype. Gets gradients.
        centers: (B, Lq, maps, 2) float32 (float64 with a float64 query), reference points (x, y) in cells, integers at
            cell centres; NaN or infinite = the query is not on this map. Gets no gradient.
        weights: (B, Lq, maps) float32, float16 or bfloat16 (or float64 with a float64 query), signed. Gets gradients.
        bias_scale: () float32 (float64 with a float64 query). Gets gradients.
        maps: the maps in the order of their tokens; Lk = Σ height · width.
        min_scale, max_scale: limits of `bias_scale`.
        max_bias: limit of the bias, both ways.
        scale: factor on query · key; None = dim ** −0.5.
        backend: None or "auto", "torch", "triton".

    Returns:
        (B, Lq, heads, dim) in `query`'s dtype (under autocast: the autocast dtype), contiguous.

    Raises:
        ValueError: a shape, a device, a map or a limit does not fit, or `centers` requires grad.
        TypeError: a dtype is not supported, or query, key and value differ.
        BackendError: the backend asked for cannot serve the call.
    """
    _validate_shapes(query, key, value, centers, weights, bias_scale, maps)
    query, key, value = (to_autocast_dtype(tensor) for tensor in (query, key, value))
    _validate_contents(query, key, value, centers, weights, bias_scale)
    _validate_numbers(min_scale, max_scale, max_bias, scale)
    tensors = (query, key, value, centers.detach(), weights, bias_scale)
    limits = (float(min_scale), float(max_scale), float(max_bias))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    flat_maps = tuple(number for token_map in maps for number in token_map)
    backend = choose_backend(backend, *tensors)
    from .ops import window_bias_attention as implementation

    with annotate(NAME):
        return implementation(*tensors, flat_maps, *limits, scale, backend)


def _validate_shapes(query, key, value, centers, weights, bias_scale, maps):
    if len(maps) == 0:
        raise ValueError(f"{NAME}: maps is empty, needs at least one TokenMap")
    for position, token_map in enumerate(maps):
        if len(token_map) != 3 or not all(isinstance(number, int) and number > 0 for number in token_map):
            raise ValueError(
                f"{NAME}: maps[{position}] is {tuple(token_map)}, "
                "needs TokenMap(height, width, window) of integers above 0"
            )
    shapes = Shapes(NAME, maps=len(maps), Lk=sum(height * width for height, width, _ in maps))
    dim = shapes.bind("query", query, "B", "Lq", "heads", "dim")[-1]
    if not MIN_DIM <= dim <= MAX_DIM:
        raise ValueError(f"{NAME}: query has dim {dim}, needs {MIN_DIM} to {MAX_DIM}")
    shapes.bind("key", key, "B", "Lk", "heads", "dim")
    shapes.bind("value", value, "B", "Lk", "heads", "dim")
    shapes.bind("centers", centers, "B", "Lq", "maps", 2)
    shapes.bind("weights", weights, "B", "Lq", "maps")
    shapes.bind("bias_scale", bias_scale)


def _validate_contents(query, key, value, centers, weights, bias_scale):
    check_dtype(NAME, "query", query, FLOAT_DTYPES)
    check_dtype(NAME, "key", key, (query.dtype,))
    check_dtype(NAME, "value", value, (query.dtype,))
    check_geometry_dtype(NAME, query, centers=centers, bias_scale=bias_scale)
    # Under autocast weights come in any dtype that the layers before them chose.
    check_dtype(NAME, "weights", weights, [t for t in FLOAT_DTYPES if t != torch.float64 or query.dtype == t])
    others = dict(key=key, value=value, centers=centers, weights=weights, bias_scale=bias_scale)
    check_same_device(NAME, "query", query, **others)
    check_no_grad(NAME, centers=centers)


def _validate_numbers(min_scale, max_scale, max_bias, scale):
    for argument, number in dict(min_scale=min_scale, max_scale=max_scale, max_bias=max_bias, scale=scale).items():
        if not isinstance(number, Real) and not (argument == "scale" and number is None):
            raise TypeError(f"{NAME}: {argument} is a {type(number).__name__}, needs a number")
    if not min_scale <= max_scale:
        raise ValueError(f"{NAME}: min_scale is {min_scale} and max_scale {max_scale}, needs min_scale ≤ max_scale")
    if not max_bias >= 0:
        raise ValueError(f"{NAME}: max_bias is {max_bias}, needs at least 0")
