"""The painted ground: a picture of coverages from above, with smaller copies for the distance."""

import numpy as np
from PIL import Image, ImageDraw

CHANNELS = ("road", "white", "yellow", "lawn")
TEXEL = 0.1  # metres
LEVELS = 6


class Ground:
    """Coverage of road, white paint, yellow paint and lawn over a rectangle; white off the road is kerb stone.

    Args:
        bounds: (x0, y0, x1, y1) in metres.
        paint: (channel, polygon (N, 2), covered) triples, drawn in this order; a polygon that is not covered clears.
    """

    def __init__(self, bounds, paint):
        self.origin = np.asarray(bounds[:2], dtype=float)
        size = np.ceil((np.asarray(bounds[2:]) - self.origin) / TEXEL / 2**LEVELS).astype(int) * 2**LEVELS
        layers = [self._draw(channel, size, paint) for channel in CHANNELS]
        self.levels = [np.stack([np.asarray(layer) for layer in layers], axis=-1)]
        for _ in range(LEVELS - 1):
            layers = [layer.reduce(2) for layer in layers]
            self.levels.append(np.stack([np.asarray(layer) for layer in layers], axis=-1))

    def _draw(self, channel, size, paint) -> Image.Image:
        image = Image.new("L", tuple(int(n) * 2 for n in size))
        draw = ImageDraw.Draw(image)
        for name, polygon, covered in paint:
            if name == channel:
                corners = (np.asarray(polygon)[:, :2] - self.origin) * (2 / TEXEL) - 0.5
                draw.polygon([tuple(corner) for corner in corners.tolist()], fill=255 if covered else 0)
        return image.reduce(2)

    def coverage(self, x, y, footprint) -> np.ndarray:
        """(n, 4) coverages in [0, 1] at world points, averaged over about `footprint` metres, with crisp edges."""
        result = np.zeros((len(x), 4), dtype=np.float32)
        level = np.clip(np.log2(np.maximum(footprint / TEXEL, 1)) + 0.5, 0, LEVELS - 1).astype(np.int8)
        x, y = x - self.origin[0], y - self.origin[1]
        for i in range(LEVELS):
            chosen = np.flatnonzero(level == i)
            if len(chosen):
                texel = TEXEL * 2**i
                value = _bilinear(self.levels[i], x[chosen] / texel - 0.5, y[chosen] / texel - 0.5)
                sharpness = np.clip(texel / np.maximum(footprint[chosen], 1e-3), 1, 6)[:, None]
                result[chosen] = np.clip((value - 0.5) * sharpness + 0.5, 0, 1)
        return result

    def channel(self, name: str) -> np.ndarray:
        """(rows, columns) coverage of one channel in [0, 255] at the finest level; row 0 is the lowest y."""
        return self.levels[0][:, :, CHANNELS.index(name)]


def _bilinear(picture, u, v) -> np.ndarray:
    """(n, C) values in [0, 1]; the picture is continued by nothing."""
    height, width = picture.shape[:2]
    left, low = np.floor(u), np.floor(v)
    share_u, share_v = (u - left).astype(np.float32)[:, None], (v - low).astype(np.float32)[:, None]
    inside = (left >= 0) & (low >= 0) & (left < width - 1) & (low < height - 1)
    start = np.where(inside, low * width + left, 0).astype(np.int64)
    texels = np.ascontiguousarray(picture).view(np.uint32).reshape(-1)  # four coverages are read at once

    def read(offset):
        return texels[start + offset].view(np.uint8).reshape(-1, 4).astype(np.float32)

    lower = read(0) * (1 - share_u) + read(1) * share_u
    upper = read(width) * (1 - share_u) + read(width + 1) * share_u
    return (lower * (1 - share_v) + upper * share_v) * (inside[:, None] / np.float32(255))
