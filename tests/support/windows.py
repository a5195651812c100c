"""Maps, and centres that are hard on whatever looks for tokens in windows."""

import math

import torch

from rigfuse.kernels import TokenMap

NAN, INF = math.nan, math.inf
# A map of several tiles, even and odd windows, one larger than its map, a single cell, prime sizes.
MAPS = (TokenMap(26, 17, 5), TokenMap(5, 7, 4), TokenMap(3, 2, 8), TokenMap(1, 1, 1), TokenMap(13, 11, 3))
SMALL = (TokenMap(5, 7, 4), TokenMap(3, 2, 8), TokenMap(1, 1, 1), TokenMap(9, 5, 3))


def tokens(maps):
    return sum(height * width for height, width, _ in maps)


def cells_of(token_map, center):
    """The cells of a window that lie on the map, by walking it."""
    height, width, window = token_map
    if not all(math.isfinite(c) for c in center):
        return []
    left, top = (math.floor(c + 0.5) - window // 2 for c in center)
    columns, rows = range(max(0, left), min(width, left + window)), range(max(0, top), min(height, top + window))
    return [row * width + column for row in rows for column in columns]


def hostile_centers(batch, length, maps):
    """On the map and round it, half cells, and what is nowhere; most queries gather in a few rows of the first map."""
    sizes = torch.tensor([[width, height] for height, width, _ in maps])
    centers = torch.rand(batch, length, len(maps), 2) * (sizes + 8) - 4
    centers[:, :, 0, 1] = 12 + 2 * torch.rand(batch, length)
    centers[:, ::3] = centers[:, ::3].floor() + 0.5
    odd = [(NAN, NAN), (NAN, 1.0), (1.0, NAN), (INF, 2.0), (2.0, -INF), (3e38, 0.0), (-1e10, 2.0), (0.0, 2.0**31)]
    odd += [(-0.5, -0.5), (-6.0, 0.0), (0.0, 1e9), (20.0, 30.0), (0.0, 0.0)]
    for position, center in enumerate(odd[:length]):
        centers[:, position] = torch.tensor(center)
    return centers
