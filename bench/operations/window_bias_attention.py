"""window_bias_attention and its peers."""

import torch
import torch.nn.functional as F

from ...kernels import TokenMap, window_bias_attention
from ...kernels.window_bias_attention import definition
from ..operation import Inputs, Operation, require_cuda, require_package
from ..workload import Unavailable

_LIMITS = dict(min_scale=0.5, max_scale=5.0, max_bias=5.0)


def make_inputs(queries, bev, pers_height, pers_width, heads, dim, *, window=8, dtype, device, generator):
    """A BEV map of bev × bev cells and six camera maps; every query is somewhere on the BEV map and on one camera."""
    maps = (TokenMap(bev, bev, 5), *[TokenMap(pers_height, pers_width, window)] * 6)
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


def toolkit(query, key, value, centers, weights, bias_scale, maps, *, backend=None):
    settings = dict(**_LIMITS, backend=backend)
    return window_bias_attention(query, key, value, centers, weights, bias_scale, maps=maps, **settings)


def strength(weights, bias_scale):
    """(B, Lq, maps): the bias in each window."""
    scale = bias_scale.clamp(_LIMITS["min_scale"], _LIMITS["max_scale"])
    return (scale * weights).clamp(-_LIMITS["max_bias"], _LIMITS["max_bias"])


def dense_bias(centers, weights, bias_scale, maps):
    """(B, Lq, Lk), zero outside the windows."""
    numbers = [number for token_map in maps for number in token_map]
    return definition.dense_bias(centers, weights, bias_scale, numbers, **_LIMITS)


def biased_sdpa(query, key, value, centers, weights, bias_scale, maps):
    """PyTorch's attention with the dense bias as its mask, in the dtype of the queries."""
    bias = dense_bias(centers, weights, bias_scale, maps)[:, None].to(query.dtype)
    bias = bias.expand(-1, query.shape[2], -1, -1)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


def unbiased_eager(query, key, value, centers, weights, bias_scale, maps):
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), value)


def unbiased_sdpa(query, key, value, centers, weights, bias_scale, maps):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def unbiased_flash(inputs: Inputs):
    """flash-attn, which takes no bias."""
    require_package("flash_attn")
    require_cuda(inputs)
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable("flash-attn takes float16 and bfloat16 only")
    from flash_attn import flash_attn_func

    return lambda query, key, value, *bias: flash_attn_func(query, key, value)


def sdpa_by(name):
    """A peer: the same by one of PyTorch's fused kernels. Its flash kernel takes no mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*arguments):
        with sdpa_kernel(getattr(SDPBackend, name)):
            return biased_sdpa(*arguments)

    def prepare(inputs):
        require_cuda(inputs)
        return run

    return prepare


def flex(inputs: Inputs):
    """FlexAttention with the windows as its score_mod. What belongs to a key is made beforehand, in the peer's favour.

    The scale reaches it inside the windows' strengths: a captured number of no dimension has no gradient there.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if inputs.device.type == "cpu":
        raise Unavailable("FlexAttention computes no gradients on the CPU")
    attention = torch.compile(flex_attention, dynamic=False)
    maps = inputs.arguments["maps"]
    map_of, x_of, y_of = (place.to(inputs.grad.device) for place in _places(maps))
    windows = torch.tensor([token_map.window for token_map in maps], device=inputs.grad.device)

    def run(query, key, value, centers, weights, bias_scale, maps):
        first = (centers + 0.5).floor() - windows[:, None] // 2  # (B, Lq, maps, 2)
        strengths = strength(weights, bias_scale)

        def add_bias(score, b, head, i, j):
            m = map_of[j]
            x, y, window = x_of[j] - first[b, i, m, 0], y_of[j] - first[b, i, m, 1], windows[m]
            inside = (x >= 0) & (x < window) & (y >= 0) & (y < window)
            return score + torch.where(inside, strengths[b, i, m], 0.0)

        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return attention(query, key, value, score_mod=add_bias).transpose(1, 2)

    return run


def _places(maps):
    """Of every key: the number of its map, its column, its row."""
    parts = []
    for m, (height, width, _) in enumerate(maps):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(torch.stack([torch.full_like(x, m), x, y]).flatten(1))
    return torch.cat(parts, dim=1)


def careful_tiles(inputs: Inputs, architecture: str) -> dict[str, float]:
    """The share of the forward kernel's tiles that a window touches, so that they take the slow path, map by map.

    A tile is BLOCK_M queries, neighbours in the kernel's order, by BLOCK_N keys of one map; as many more as the last
    one of a map that its end cuts are slow too.
    """
    from ...kernels.window_bias_attention import configs
    from ...kernels.window_bias_attention.order import query_order

    arguments = inputs.arguments
    query, centers, maps = arguments["query"], arguments["centers"], arguments["maps"]
    config = configs.forward(architecture, query.element_size(), query.shape[3])
    rows, columns = config["BLOCK_M"], config["BLOCK_N"]
    orders = query_order(centers).unbind(1)
    shares, slow_in_all, tiles_in_all = {}, 0, 0
    for m, ((height, width, window), order) in enumerate(zip(maps, orders)):
        cells = height * width
        left, top = (
            ((centers[:, :, m] + 0.5).floor() - window // 2).gather(1, order[..., None].expand(-1, -1, 2)).unbind(-1)
        )
        touches = (left > -window) & (left < width) & (top > -window) & (top < height)
        first = torch.where(touches, top.clamp(min=0), height)
        end = torch.where(touches, (top + window).clamp(max=height), 0)
        pad = -len(order[0]) % rows
        first = F.pad(first, (0, pad), value=height).unflatten(1, (-1, rows)).amin(-1) * width // columns
        end = -(F.pad(end, (0, pad)).unflatten(1, (-1, rows)).amax(-1) * width // -columns)
        full = cells // columns
        near = end.clamp(max=full) - first.clamp(max=full)
        slow = int(near.clamp(min=0).sum()) + first.numel() * (cells % columns > 0)
        tiles = first.numel() * -(-cells // columns)
        name = f"careful tiles, map {m + 1} of {len(maps)} ({height}×{width})"
        shares[name] = slow / tiles
        slow_in_all, tiles_in_all = slow_in_all + slow, tiles_in_all + tiles
    return {"careful tiles": slow_in_all / tiles_in_all, **shares}


_CMT = dict(queries=900, bev=128, pers_height=20, pers_width=50, heads=8, dim=32)
OPERATION = Operation(
    name="window_bias_attention",
    cases={
        "cmt-sixteenth": {**_CMT, "queries": 225, "bev": 64, "pers_height": 10, "pers_width": 25},
        "cmt-quarter": {**_CMT, "bev": 64, "pers_height": 10, "pers_width": 25},
        "cmt": _CMT,
        "tiny": {**_CMT, "queries": 9, "bev": 12, "pers_height": 4, "pers_width": 6, "heads": 2},
    },
    make_inputs=make_inputs,
    function=toolkit,
    peers={
        "sdpa": lambda inputs: biased_sdpa,  # which PyTorch chooses
        "sdpa-math": sdpa_by("MATH"),
        "sdpa-efficient": sdpa_by("EFFICIENT_ATTENTION"),
        "sdpa-cudnn": sdpa_by("CUDNN_ATTENTION"),
        "flex": flex,
    },
    lesser={
        "unbiased-eager": lambda inputs: unbiased_eager,
        "unbiased-sdpa": lambda inputs: unbiased_sdpa,
        "unbiased-flash": unbiased_flash,
    },
    quick=("cmt-sixteenth",),
    heavy=("cmt",),
    matter=("cmt",),
    shares=careful_tiles,
    axis="queries",
)
