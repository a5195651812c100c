"""The public function."""

from collections.abc import Sequence

import torch

from ..runtime.arguments import Argument, Arguments, any_float, geometry, same_float, wide_only_beside_wide
from ..runtime.checks import check_number
from ..runtime.token_maps import TokenMap, flat_maps
from . import ops

NAME = "window_bias_attention"
_TOKENS = (("B", "Lk", "heads", "dim"),)
ARGUMENTS = Arguments(
    NAME,
    query=Argument((("B", "Lq", "heads", "dim"),), any_float, gradient=True, autocast=True),
    key=Argument(_TOKENS, same_float, gradient=True, autocast=True),
    value=Argument(_TOKENS, same_float, gradient=True, autocast=True),
    centers=Argument((("B", "Lq", "maps", 2),), geometry),
    # Under autocast weights come in any dtype that the layers before them chose.
    weights=Argument((("B", "Lq", "maps"),), wide_only_beside_wide, gradient=True),
    bias_scale=Argument(((),), geometry, gradient=True),
    limits={"dim": (16, 128)},
)
OPERATION = ops.register(ARGUMENTS)


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
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        (B, Lq, heads, dim) in `query`'s dtype (under autocast: the autocast dtype), contiguous.

    Raises:
        ValueError: a shape, a device, a map, a limit or `scale` does not fit, or `centers` requires grad.
        TypeError: a dtype is not supported, or query, key and value differ.
        BackendError: the backend asked for cannot serve the call.
    """
    flat, tokens = flat_maps(NAME, maps)
    tensors, sizes = ARGUMENTS.check(query, key, value, centers, weights, bias_scale, maps=len(maps), Lk=tokens)
    _check_numbers(min_scale, max_scale, max_bias, scale)
    limits = (float(min_scale), float(max_scale), float(max_bias))
    return OPERATION(backend, tensors, flat, *limits, sizes["dim"] ** -0.5 if scale is None else float(scale))


def _check_numbers(min_scale, max_scale, max_bias, scale):
    for argument, number in dict(min_scale=min_scale, max_scale=max_scale, max_bias=max_bias).items():
        check_number(NAME, argument, number, finite=False)
    if scale is not None:
        check_number(NAME, "scale", scale, "a finite number or None")
    if min_scale > max_scale:
        raise ValueError(f"{NAME}: min_scale is {min_scale} and max_scale {max_scale}, needs min_scale ≤ max_scale")
    if max_bias < 0:
        raise ValueError(f"{NAME}: max_bias is {max_bias}, needs at least 0")
