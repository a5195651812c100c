"""The mathematics, as it is written down: the listed keys are gathered for each query block, the scores stored."""

import torch


def forward(query, key, value, block_table, key_mask, scale):
    blocks, length = key.shape[:2]
    counts = torch.ones(blocks, length, dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    # What nobody attends to may be anything, NaN included. Entries of none read block number `blocks`, all zeros.
    key, value = (tensor.masked_fill(~counts[:, :, None, None], 0) for tensor in (key, value))
    table = torch.where((block_table >= 0) & (block_table < blocks), block_table, blocks)
    counts, key, value = (
        torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])[table].flatten(1, 2)
        for tensor in (counts, key, value)
    )  # (Nq, keys, …)
    unseen = ~counts[:, None, None]
    scores = torch.einsum("nihd,njhd->nhij", query, key) * scale
    shares = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1)
    shares = shares.masked_fill(unseen, 0)  # a query without any key attends to nothing
    return torch.einsum("nhij,njhd->nihd", shares, value)
