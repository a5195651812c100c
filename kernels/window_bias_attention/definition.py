"""The mathematics, as it is written down: the bias and the scores of every query and key, stored."""

import torch


def forward(query, key, value, centers, weights, bias_scale, maps, min_scale, max_scale, max_bias, scale):
    bias = dense_bias(centers, weights, bias_scale, maps, min_scale, max_scale, max_bias)[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1).to(value.dtype), value)


def dense_bias(centers, weights, bias_scale, maps, min_scale, max_scale, max_bias):
    """The bias of every query and key, (B, Lq, Lk), zero outside the windows."""
    strength = (bias_scale.clamp(min_scale, max_scale) * weights).clamp(-max_bias, max_bias)  # (B, Lq, maps)
    biases = [torch.where(w, strength[:, :, m, None], 0) for m, w in enumerate(inside_windows(centers, maps))]
    return torch.cat(biases, dim=2)


def inside_windows(centers, maps):
    """For each map: which of its cells each query's window covers, (B, Lq, height · width) bool."""
    windows = []
    for m, (height, width, window) in enumerate(zip(maps[::3], maps[1::3], maps[2::3])):
        left = torch.floor(centers[:, :, m] + 0.5) - window // 2  # (B, Lq, 2) as (x, y); NaN compares false everywhere
        columns, rows = (
            (cells >= left[..., axis, None]) & (cells < left[..., axis, None] + window)
            for axis, cells in enumerate(torch.arange(n, device=centers.device) for n in (width, height))
        )
        windows.append((rows[..., :, None] & columns[..., None, :]).flatten(2))
    return windows
