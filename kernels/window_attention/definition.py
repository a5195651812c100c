"""The mathematics, as it is written down: the scores of every query and key, stored, those outside masked."""

import torch

from ..window_bias_attention.definition import inside_windows


def forward(query, key, value, centers, maps, scale):
    inside = torch.cat(inside_windows(centers, maps), dim=2)[:, None]  # (B, 1, Lq, Lk)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    shares = torch.where(inside, scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
    shares = torch.where(inside, shares, 0)  # of a query without any token all are nothing
    return torch.einsum("bhij,bjhd->bihd", shares.to(value.dtype), value)
