"""Baselines that store what they like, where the operations have no such definition of their own yet."""

import torch

from .peers import gather_blocks, gather_mask


def eager_attention(query, key, value, block_table, key_mask):
    """`cross_camera_attention` with gathered keys and values and stored scores."""
    key, value = gather_blocks(key, block_table), gather_blocks(value, block_table)
    mask = gather_mask(block_table, key_mask)[:, None, None]
    scores = torch.einsum("nihd,njhd->nhij", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask, 0)  # a query without any key attends to nothing
    return torch.einsum("nhij,njhd->nihd", weights, value)


def eager_fusion(original, completed, gate_logits):
    """`gated_fusion` as the formula stands."""
    gate = torch.sigmoid(gate_logits)
    return original * (1 - gate) + completed * gate
