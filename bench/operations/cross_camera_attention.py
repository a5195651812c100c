"""cross_camera_attention and its peers."""

import torch
import torch.nn.functional as F

from ...kernels import cross_camera_attention
from ..operation import Inputs, Operation, require_cuda, require_package
from ..peers import gather_blocks, gather_mask, gathered_sdpa
from ..workload import Unavailable


def make_inputs(queries, blocks, listed, height, width, pool, heads, dim, *, dtype, device, generator):
    """`queries` missing cameras with height × width cells; each lists its own `listed` of the `blocks` key blocks."""
    cells, keys = height * width, -(-height // pool) * -(-width // pool)
    query, grad = (torch.randn(queries, cells, heads, dim, generator=generator) for _ in range(2))
    key, value = (torch.randn(blocks, keys, heads, dim, generator=generator) for _ in range(2))
    table = (torch.arange(queries)[:, None] + torch.arange(listed)) % blocks
    key_mask = torch.rand(blocks, keys, generator=generator) < 0.9
    query, key, value, grad = (t.to(device, dtype) for t in (query, key, value, grad))
    used = table.unique().numel()
    return Inputs(
        arguments=dict(query=query, key=key, value=value, table=table.to(device), key_mask=key_mask.to(device)),
        leaves=("query", "key", "value"),
        grad=grad,
        flops=4 * queries * cells * listed * keys * heads * dim,
        read=[query, key[:used], value[:used]],
    )


def toolkit(query, key, value, table, key_mask, *, backend=None):
    return cross_camera_attention(query, key, value, table, key_mask=key_mask, backend=backend)


def flex(inputs: Inputs):
    """FlexAttention over all blocks, the table as a block mask. The mask is made beforehand, in the peer's favour."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if inputs.device.type == "cpu":
        raise Unavailable("FlexAttention computes no gradients on the CPU")
    query, key = inputs.arguments["query"], inputs.arguments["key"]
    table, key_mask = inputs.arguments["table"], inputs.arguments["key_mask"]
    listed = torch.zeros(len(query), len(key), dtype=torch.bool, device=inputs.device).scatter_(1, table, True)
    attends = (listed[:, :, None] & key_mask).flatten(1)

    def mask(b, h, q, k):
        return attends[b, k]

    block_mask = create_block_mask(mask, len(query), None, query.shape[1], attends.shape[1], device=inputs.device)
    attention = torch.compile(flex_attention, dynamic=False)

    def run(query, key, value, table, key_mask):
        key, value = (t.flatten(0, 1)[None].expand(len(query), -1, -1, -1).transpose(1, 2) for t in (key, value))
        return attention(query.transpose(1, 2), key, value, block_mask=block_mask).transpose(1, 2)

    return run


def flash(inputs: Inputs):
    """flash-attn on packed keys: it takes no mask, so the keys that count are picked out first."""
    require_package("flash_attn")
    require_cuda(inputs)
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable("flash-attn takes float16 and bfloat16 only")
    from flash_attn import flash_attn_varlen_func

    mask = gather_mask(inputs.arguments["table"], inputs.arguments["key_mask"])
    chosen = mask.flatten().nonzero()[:, 0]
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    longest, cells = int(mask.sum(1).max()), inputs.arguments["query"].shape[1]
    starts = torch.arange(len(mask) + 1, dtype=torch.int32, device=inputs.device) * cells

    def run(query, key, value, table, key_mask):
        key, value = (gather_blocks(t, table).flatten(0, 1)[chosen] for t in (key, value))
        out = flash_attn_varlen_func(query.flatten(0, 1), key, value, starts, ends, cells, longest)
        return out.unflatten(0, query.shape[:2])

    return run


_DOCUMENTS = dict(queries=1, blocks=6, listed=3, height=28, width=50, pool=4, heads=8, dim=32)
OPERATION = Operation(
    name="cross_camera_attention",
    cases={
        "upstream": {**_DOCUMENTS, "height": 8, "width": 22},
        "documents": _DOCUMENTS,
        "documents-t4": {**_DOCUMENTS, "blocks": 24, "listed": 12},
        "upstream-fine": {**_DOCUMENTS, "height": 32, "width": 88},
        "upstream-finest": {**_DOCUMENTS, "height": 64, "width": 176},
        "tiny": {**_DOCUMENTS, "height": 4, "width": 6, "heads": 2},
    },
    make_inputs=make_inputs,
    function=toolkit,
    peers=dict(sdpa=lambda inputs: gathered_sdpa, flex=flex, flash=flash),
    quick=("upstream", "documents"),
    heavy=("upstream-finest",),
    matter=("documents-t4", "upstream-finest"),
)
