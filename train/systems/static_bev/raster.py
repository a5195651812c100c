"""Draws lines and areas into the cells of a grid, as the share of each cell that they cover."""

from collections.abc import Iterable

import numpy as np

from ....kernels.runtime.extras import optional
from ....modules.static_bev.grid import BevGrid

shapely = optional("train", "shapely")

_SUBROWS = 4  # lines across each row of cells along which areas are measured; within them coverage is exact


def draw_lines(grid: BevGrid, lines: Iterable[np.ndarray], width: float) -> np.ndarray:
    """Coverage (rows, columns) float32 in [0, 1] of polylines (N, 2) in metres that are `width` metres wide.

    It follows from the distance of each cell's centre to the nearest line: 1 within the line by half a cell or more, 0
    outside by as much, so a line's place is kept to a fraction of a cell.
    """
    distance = np.full(grid.shape, np.inf, dtype=np.float32)
    reach = (width + grid.size) / 2
    corner = np.array([grid.x[0], grid.y[0]])
    limit = np.array([grid.columns, grid.rows])
    for line in lines:
        for start, end in zip(line[:-1], line[1:]):
            low = np.floor((np.minimum(start, end) - reach - corner) / grid.size).astype(int).clip(0, limit)
            high = np.ceil((np.maximum(start, end) + reach - corner) / grid.size).astype(int).clip(0, limit)
            if (low >= high).any():
                continue
            u, v = np.arange(low[0], high[0]), np.arange(low[1], high[1])
            x = (corner[0] + (u + 0.5) * grid.size - start[0])[None]
            y = (corner[1] + (v + 0.5) * grid.size - start[1])[:, None]
            along = end - start
            share = ((x * along[0] + y * along[1]) / max(along @ along, 1e-12)).clip(0, 1)
            there = distance[low[1] : high[1], low[0] : high[0]]
            np.minimum(there, np.hypot(x - share * along[0], y - share * along[1]), out=there)
    return ((reach - distance) / grid.size).clip(0, 1)


def draw_areas(grid: BevGrid, polygons: "Iterable[shapely.Polygon]") -> np.ndarray:
    """Coverage (rows, columns) float32 in [0, 1] of polygons in metres, their holes left out.

    Where polygons touch, their shares of a cell add up.
    """
    rows = grid.rows * _SUBROWS
    sums = np.zeros((rows, grid.columns + 2))
    rings = [
        (shapely.get_coordinates(ring) - [grid.x[0], grid.y[0]]) / [grid.size, grid.size / _SUBROWS]
        for polygon in map(shapely.geometry.polygon.orient, polygons)
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    if not rings:
        return np.zeros(grid.shape, dtype=np.float32)
    a, b = (np.concatenate([ring[part] for ring in rings]) for part in (slice(None, -1), slice(1, None)))
    sign = np.where(b[:, 1] > a[:, 1], -1.0, 1.0)  # the area is beyond an edge that goes down
    low, high = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 1], b[:, 1])
    first = np.ceil(low - 0.5).astype(int).clip(0, rows)  # the first sub-row whose middle is not below the edge
    count = np.ceil(high - 0.5).astype(int).clip(0, rows) - first
    edge = np.repeat(np.arange(len(a)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(count.cumsum() - count, count)
    slope = (b[:, 0] - a[:, 0])[edge] / (b[:, 1] - a[:, 1])[edge]
    column = (a[edge, 0] + (row + 0.5 - a[edge, 1]) * slope).clip(0, grid.columns)
    # An edge that crosses a sub-row within a cell changes all cells beyond, and its own by the part that lies beyond.
    cell = np.floor(column).astype(int)
    part = column - cell
    np.add.at(sums, (row, cell), sign[edge] * (1 - part))
    np.add.at(sums, (row, cell + 1), sign[edge] * part)
    covered = sums.cumsum(axis=1)[:, : grid.columns]
    return covered.reshape(grid.rows, _SUBROWS, -1).mean(axis=1).clip(0, 1).astype(np.float32)
