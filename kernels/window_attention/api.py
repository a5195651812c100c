"""The public function."""

from collections.abc import Sequence

import torch

from ..runtime.arguments import Argument, Arguments, any_float, geometry, same_float
from ..runtime.checks import check_number
from ..runtime.token_maps import TokenMap, flat_maps
from . import ops

_TOKENS = (("B", "Lk", "heads", "dim"),)
ARGUMENTS = Arguments(
    "window_attention",
    query=Argument((("B", "Lq", "heads", "dim"),), any_float, gradient=True, autocast=True),
    key=Argument(_TOKENS, same_float, gradient=True, autocast=True),
    value=Argument(_TOKENS, same_float, gradient=True, autocast=True),
    centers=Argument((("B", "Lq", "maps", 2),), geometry),
    limits={"dim": (16, 128)},
)
OPERATION = ops.register(ARGUMENTS)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    centers: torch.Tensor,
    *,
    maps: Sequence[TokenMap],
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each query to the tokens inside its windows, one on each map, and to no others.

    Per axis a window begins at left = floor(center + 0.5) − window // 2; the token at (x, y) of its map is inside where
    left ≤ (x, y) < left + window on both axes. A window may lie over the border, where fewer tokens are left of it, or
    off the map. All windows of a query share one softmax of `scale · query · key`. A query without any token gets
    zeros, and gives no gradient.

    Time and memory grow with queries × cells of a window, forward and backward, never with queries × keys. Computed in
    float32 (float64 for float64); the Triton backend forms the gradients of key and value from products of operands in
    their own dtype, float32 as tf32 unless `torch.get_float32_matmul_precision()` is "highest". Under autocast query,
    key and value are cast to the autocast dtype, float64 excepted. Results are bitwise repeatable.

    Args:
        query: (B, Lq, heads, dim), 16 ≤ dim ≤ 128. Gets gradients.
        key: (B, Lk, heads, dim) in `query`'s dtype, the tokens of all maps one after another. Gets gradients.
        value: (B, Lk, heads, dim) in `query`'s dtype. Gets gradients.
        centers: (B, Lq, maps, 2) float32 (float64 with a float64 query), reference points (x, y) in cells, integers at
            cell centres; NaN or infinite = the query is not on this map. Gets no gradient.
        maps: the maps in the order of their tokens; Lk = Σ height · width.
        scale: factor on query · key; None = dim ** −0.5.
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        (B, Lq, heads, dim) in `query`'s dtype (under autocast: the autocast dtype), contiguous.

    Raises:
        ValueError: a shape, a device, a map or `scale` does not fit, or `centers` requires grad.
        TypeError: a dtype is not supported, or query, key and value differ.
        BackendError: the backend asked for cannot serve the call.
    """
    flat, tokens = flat_maps(ARGUMENTS.operation, maps)
    tensors, sizes = ARGUMENTS.check(query, key, value, centers, maps=len(maps), Lk=tokens)
    if scale is not None:
        check_number(ARGUMENTS.operation, "scale", scale, "a finite number or None")
    return OPERATION(backend, tensors, flat, sizes["dim"] ** -0.5 if scale is None else float(scale))
