"""The mathematics in plain PyTorch: any float dtype, any device, differentiated by autograd.

The listed keys are gathered, once for each query block; scores are never stored, as the attention of PyTorch is flash.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def cross_camera_attention(query, key, value, block_table, key_mask, scale):
    if _every_key_counts(block_table, key_mask):
        return _attend(query, key[block_table], value[block_table], None, scale)

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
    key, value = (pad(tensor, (0, 0, 0, 0, 0, 0, 0, 1))[table] for tensor in (key, value))
    return _attend(query, key, value, (seen | empty)[:, None, None], scale)


def _every_key_counts(block_table, key_mask):
    """Whether no mask is needed, where finding out is cheap: a device would have to be waited for."""
    if torch.compiler.is_compiling() or block_table.device.type != "cpu" or block_table.numel() == 0:
        return False
    return bool(block_table.min() >= 0) and (key_mask is None or bool(key_mask.all()))


def _attend(query, key, value, mask, scale):
    """query (Nq, Lq, heads, dim), key and value (Nq, M, Lk, heads, dim), mask (Nq, 1, 1, M·Lk)."""
    query, key, value = query.transpose(1, 2), key.flatten(1, 2).transpose(1, 2), value.flatten(1, 2).transpose(1, 2)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()
