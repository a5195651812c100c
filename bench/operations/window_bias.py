"""window_bias_attention and its peers."""

import torch
import torch.nn.functional as F

from ...kernels import TokenMap, window_bias_attention
from .operation import Inputs, Operation

_LIMITS = dict(min_scale=0.5, max_scale=5.0, max_bias=5.0)


def make_inputs(queries, bev, pers_height, pers_width, heads, dim, *, dtype, device, generator):
    """A BEV map of bev × bev cells and six camera maps; every query is somewhere on the BEV map and on one camera."""
    maps = _maps(bev, pers_height, pers_width)
    keys = sum(token_map.height * token_map.width for token_map in maps)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    query, grad = (torch.randn(1, queries, heads, dim, generator=generator).to(device, dtype) for _ in range(2))
    key, value = (torch.randn(1, keys, heads, dim, generator=generator).to(device, dtype) for _ in range(2))
    extent = torch.tensor([[token_map.width, token_map.height] for token_map in maps])
    centers = torch.rand(1, queries, len(maps), 2, generator=generator) * extent
    camera = torch.randint(1, len(maps), (1, queries, 1), generator=generator)
    elsewhere = torch.arange(len(maps)).expand(1, queries, -1) != camera
    elsewhere[..., 0] = False
    centers = centers.masked_fill(elsewhere[..., None], float("nan"))
    weights = 2 * torch.rand(1, queries, len(maps), generator=generator) - 1
    arguments = dict(query=query, key=key, value=value)
    arguments |= dict(centers=centers.to(device, geometry), weights=weights.to(device, geometry))
    arguments["bias_scale"] = torch.tensor(2.5, device=device, dtype=geometry)
    flops = 4 * queries * keys * heads * dim
    leaves = ("query", "key", "value", "weights", "bias_scale")
    return Inputs({**arguments, "maps": maps}, leaves, grad, flops, read=list(arguments.values()))


def _maps(bev, pers_height, pers_width):
    return (TokenMap(bev, bev, 5), *[TokenMap(pers_height, pers_width, 8)] * 6)


def toolkit(query, key, value, centers, weights, bias_scale, maps):
    return window_bias_attention(query, key, value, centers, weights, bias_scale, maps=maps, **_LIMITS)


def dense_bias(centers, weights, bias_scale, maps):
    """(B, Lq, Lk), zero outside the windows."""
    scale = bias_scale.clamp(_LIMITS["min_scale"], _LIMITS["max_scale"])
    strengths = (scale * weights).clamp(-_LIMITS["max_bias"], _LIMITS["max_bias"])
    parts = []
    for m, (height, width, window) in enumerate(maps):
        left = (centers[:, :, m] + 0.5).floor() - window // 2  # (B, Lq, 2); NaN compares false everywhere
        inside = [
            (cells >= left[..., axis, None]) & (cells < left[..., axis, None] + window)
            for axis, cells in enumerate(torch.arange(n, device=centers.device) for n in (width, height))
        ]
        in_window = inside[1][..., :, None] & inside[0][..., None, :]
        parts.append((in_window * strengths[:, :, m, None, None]).flatten(2))
    return torch.cat(parts, dim=2)


def eager(query, key, value, centers, weights, bias_scale, maps):
    """The bias and the scores of every query and key, stored."""
    bias = dense_bias(centers, weights, bias_scale, maps)[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1).to(value.dtype), value)


def biased_sdpa(query, key, value, centers, weights, bias_scale, maps):
    """PyTorch's attention with the dense bias as its mask, in the dtype of the queries."""
    bias = dense_bias(centers, weights, bias_scale, maps)[:, None].to(query.dtype)
    bias = bias.expand(-1, query.shape[2], -1, -1)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


_CMT = dict(queries=900, bev=128, pers_height=20, pers_width=50, heads=8, dim=32)
WINDOW_BIAS_ATTENTION = Operation(
    name="window_bias_attention",
    cases={
        "cmt-sixteenth": {**_CMT, "queries": 225, "bev": 64, "pers_height": 10, "pers_width": 25},
        "cmt-quarter": {**_CMT, "bev": 64, "pers_height": 10, "pers_width": 25},
        "cmt": _CMT,
        "tiny": {**_CMT, "queries": 9, "bev": 12, "pers_height": 4, "pers_width": 6, "heads": 2},
    },
    make_inputs=make_inputs,
    function=toolkit,
    eager=eager,
    peers=dict(sdpa=lambda inputs: biased_sdpa),
    quick=("cmt-sixteenth",),
    heavy=("cmt",),
    axis="queries",
)
