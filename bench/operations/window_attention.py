"""window_attention and its peers."""

import torch
import torch.nn.functional as F

from ...kernels import window_attention
from ...kernels.window_bias_attention import definition
from ..operation import Inputs, Operation
from . import window_bias_attention as biased


def make_inputs(queries, bev, pers_height, pers_width, window, heads, dim, *, dtype, device, generator):
    """As those of window_bias_attention, without a bias; `window` is the camera maps'."""
    sizes = dict(queries=queries, bev=bev, pers_height=pers_height, pers_width=pers_width, heads=heads, dim=dim)
    made = biased.make_inputs(**sizes, window=window, dtype=dtype, device=device, generator=generator)
    arguments = {name: made.arguments[name] for name in ("query", "key", "value", "centers", "maps")}
    cells = 25 + window**2  # of the BEV map and of one camera's
    return Inputs(
        arguments, ("query", "key", "value"), made.grad, 4 * queries * cells * heads * dim, read=made.read[:4]
    )


def toolkit(query, key, value, centers, maps, *, backend=None):
    return window_attention(query, key, value, centers, maps=maps, backend=backend)


def masked_sdpa(query, key, value, centers, maps):
    """PyTorch's attention with a boolean mask."""
    numbers = [number for token_map in maps for number in token_map]
    mask = torch.cat(definition.inside_windows(centers, numbers), dim=2)[:, None]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


_CMT = dict(queries=900, bev=128, pers_height=20, pers_width=50, window=8, heads=4, dim=64)
OPERATION = Operation(
    name="window_attention",
    cases={
        "cmt-sixteenth": {**_CMT, "queries": 225, "bev": 64, "pers_height": 10, "pers_width": 25},
        "cmt": _CMT,
        "cmt-1600x640": {**_CMT, "bev": 180, "pers_height": 40, "pers_width": 100, "window": 15},
        "tiny": {**_CMT, "queries": 9, "bev": 12, "pers_height": 4, "pers_width": 6, "heads": 2},
    },
    make_inputs=make_inputs,
    function=toolkit,
    peers=dict(sdpa=lambda inputs: masked_sdpa),  # eager is the definition: the tokens of every window gathered
    quick=("cmt-sixteenth",),
    heavy=("cmt", "cmt-1600x640"),
    matter=("cmt",),
    axis="queries",
)
