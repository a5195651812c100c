"""The fast plain PyTorch backend, differentiated by autograd.

The listed keys are gathered, once for each query block; scores are never stored, as the attention of PyTorch is flash.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def forward(query, key, value, block_table, key_mask, scale):
    if block_table.device.type == "cpu" and not torch.compiler.is_compiling():
        return _attend_to_seen(query, key, value, block_table, key_mask, scale)

    blocks, length = key.shape[:2]
    # Block number `blocks` is all zeros and serves the entries that name none. Each row ends with it, so that no row
    # is empty: a query without any key then attends to zeros only, which makes result and gradients exact zeros.
    listed = (block_table >= 0) & (block_table < blocks)
    table = pad(torch.where(listed, block_table, blocks), (0, 1), value=blocks)
    if key_mask is None:
        key_mask = torch.ones(blocks, length, dtype=torch.bool, device=key.device)
    else:
        key, value = (tensor.masked_fill(~key_mask[:, :, None, None], 0) for tensor in (key, value))
    seen = pad(key_mask, (0, 0, 0, 1))[table].flatten(1)  # (Nq, keys)
    empty = ~seen.any(1, keepdim=True)
    query = query.masked_fill(empty[:, :, None, None], 0)
    key, value = (pad(tensor, (0, 0, 0, 0, 0, 0, 0, 1))[table].flatten(1, 2) for tensor in (key, value))
    return _attend(query, key, value, (seen | empty)[:, None, None], scale)


def _attend_to_seen(query, key, value, block_table, key_mask, scale):
    """Where the numbers of the keys that count can be read, only these are gathered and no mask is needed."""
    blocks, length = key.shape[:2]
    every = torch.arange(blocks * length).view(blocks, length)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    attended = []
    for own, row in zip(query, block_table):
        row = row[(row >= 0) & (row < blocks)]
        seen = every[row] if key_mask is None else every[row][key_mask[row]]
        if seen.numel():
            keys, values = (tensor.index_select(0, seen.flatten())[None] for tensor in (key, value))
            attended.append(_attend(own[None], keys, values, None, scale))
        else:
            attended.append(torch.zeros_like(own)[None] + sum(x[:0].sum() for x in (own, key, value)))
    return torch.cat(attended) if attended else torch.zeros_like(query) + sum(x[:0].sum() for x in (key, value, query))


def _attend(query, key, value, mask, scale):
    """query (Nq, Lq, heads, dim), key and value (Nq, keys, heads, dim), mask (Nq, 1, 1, keys)."""
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, scale=scale)
    out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    # PyTorch's flash attention on the CPU makes zeros of a query that is NaN; nobody should have that hidden from them.
    return out.add_(query.detach().mul(0).sum(dim=-1, keepdim=True))
