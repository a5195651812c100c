"""The mathematics, as it is written down: the tokens of all windows, gathered, a softmax over those of each query."""

import torch
from torch.nn.functional import pad


def forward(query, key, value, centers, maps, scale):
    tokens, inside = tokens_in_windows(centers, maps)
    tokens = torch.where(inside, tokens, key.shape[1])  # where there is none, one of zeros behind all others
    batch = torch.arange(len(query), device=query.device)[:, None, None]
    keys, values = (pad(rows, (0, 0, 0, 0, 0, 1))[batch, tokens] for rows in (key, value))  # (B, Lq, M, heads, dim)
    scores = torch.einsum("bihd,bimhd->bihm", query, keys) * scale
    inside = inside[:, :, None]  # (B, Lq, 1, M)
    shares = torch.where(inside, scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
    shares = torch.where(inside, shares, 0)  # of a query without any token all are nothing
    return torch.einsum("bihm,bimhd->bihd", shares.to(value.dtype), values)


def tokens_in_windows(centers, maps):
    """The tokens in each query's windows on all maps, (B, Lq, M), and whether there is one: a window may lie over a
    border or off its map. M = Σ min(window, height) · min(window, width)."""
    found, start = [], 0
    for m, (height, width, window) in enumerate(zip(maps[::3], maps[1::3], maps[2::3])):
        left = torch.floor(centers[:, :, m] + 0.5) - window // 2  # (B, Lq, 2) as (x, y); NaN compares false everywhere
        # (B, Lq, side): the cells of the window along each axis, from the first that may be on the map
        columns, rows = (
            left[..., axis, None].clamp(min=0) + torch.arange(min(window, size), device=centers.device)
            for axis, size in enumerate((width, height))
        )
        end = left + window
        in_columns = (columns < end[..., :1]) & (columns < width)
        in_rows = (rows < end[..., 1:]) & (rows < height)
        columns, rows = torch.where(in_columns, columns, 0).long(), torch.where(in_rows, rows, 0).long()
        cells = start + rows[..., :, None] * width + columns[..., None, :]  # (B, Lq, rows, columns)
        found.append((cells.flatten(2), (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)))
        start += height * width
    tokens, inside = zip(*found)
    return torch.cat(tokens, dim=2), torch.cat(inside, dim=2)
