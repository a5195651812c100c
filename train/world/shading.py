"""Colours of what the rays meet. Every texture is fixed to its surface, so one point looks the same from everywhere."""

from dataclasses import dataclass

import numpy as np

from .casting import Hits, Pinhole, Placed
from .ground import Ground

HAZE = 380.0  # metres over which the air takes two thirds of the contrast


@dataclass(frozen=True)
class Light:
    """Where the sun stands and what the sky looks like."""

    sun: tuple[float, float, float] = (0.45, 0.32, 0.83)  # unit, towards the sun
    ambient: float = 0.52
    direct: float = 0.58
    zenith: tuple[float, float, float] = (0.30, 0.48, 0.78)
    horizon: tuple[float, float, float] = (0.78, 0.83, 0.88)
    clouds: float = 0.6


def _noise_tile(size: int = 256) -> np.ndarray:
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size) * size, np.fft.fftfreq(size) * size))
    amplitude = np.where(frequency > 2, 1 / np.maximum(frequency, 1) ** 1.1, 0)
    white = np.random.default_rng(0).normal(size=(size, size))
    tile = np.fft.ifft2(np.fft.fft2(white) * amplitude).real
    return (tile / tile.std()).clip(-2.5, 2.5).astype(np.float32)


_NOISE = _noise_tile()


def noise(u, v, texel: float) -> np.ndarray:
    """Periodic noise of mean 0 and variance 1, interpolated between texels of `texel` metres."""
    u, v = u * np.float32(1 / texel), v * np.float32(1 / texel)
    left, low = np.floor(u), np.floor(v)
    share_u, share_v = u - left, v - low
    left, low = left.astype(np.int32) & 255, low.astype(np.int32) & 255
    right, up = (left + 1) & 255, ((low + 1) & 255) << 8
    low <<= 8
    tile = _NOISE.ravel()
    below, above = tile[low | left], tile[up | left]
    below += (tile[low | right] - below) * share_u
    above += (tile[up | right] - above) * share_u
    return below + (above - below) * share_v


def scatter(a, b, seed) -> np.ndarray:
    """Four random bytes (n, 4) in [-0.5, 0.5] for each integer pair."""
    h = a.astype(np.uint32) * np.uint32(0x9E3779B1) ^ b.astype(np.uint32) * np.uint32(0x85EBCA77)
    h ^= np.atleast_1d(seed).astype(np.uint32) * np.uint32(0xC2B2AE3D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x2C1B3C6D)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0x297A2D39)
    h ^= h >> np.uint32(16)
    return h.view(np.uint8).reshape(-1, 4).astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)


def grid(u, v, cells, fill, footprint, seed):
    """A grid of rectangles with edges as soft as a pixel is wide: (coverage (n,), random numbers (n, 4))."""
    coverage = np.float32(1)
    index = []
    for along, cell, part in ((u, cells[0], fill[0]), (v, cells[1], fill[1])):
        at = along / cell
        whole = np.floor(at)
        index.append(whole.astype(np.int32))
        edge = (part * 0.5 - np.abs(at - whole - 0.5)) * cell
        crisp = np.clip(edge / footprint + 0.5, 0, 1)
        blurred = np.clip(2 * footprint / cell - 0.6, 0, 1)  # cells finer than a pixel melt into their mean
        coverage = coverage * (crisp + (np.minimum(part, 1) - crisp) * blurred)
    melt = np.clip(1.6 - 2 * footprint / np.minimum(*cells), 0, 1)
    return coverage, scatter(*index, seed) * melt[:, None]


def picture(view: Pinhole, hits: Hits, ground: Ground, light: Light, shadows: list[Placed]) -> np.ndarray:
    """(H, W, 3) uint8 colours."""
    colours = np.empty((hits.inverse.size, 3), dtype=np.float32)
    inverse, face = hits.inverse.ravel(), hits.face.ravel()
    shadow = _shadow(view, hits, light, shadows).ravel()
    faces = _face_rows(hits, light)
    horizon = np.array(light.horizon, np.float32)
    for some in _batches(np.flatnonzero(inverse <= 0)):
        colours[some] = _sky(view.directions(some), light)
    for some in _batches(np.flatnonzero(inverse > 0)):
        on_ground = face[some] < 0
        floor, solid = some[on_ground], some[~on_ground]
        surface = np.empty((len(some), 3), dtype=np.float32)
        if len(floor):
            surface[on_ground] = _floor(view, floor, inverse, ground, light, shadow)
        if len(solid):
            surface[~on_ground] = _faces(view, solid, inverse, face, hits.seeds, faces)
        clear = np.exp(-1 / (inverse[some] * np.float32(HAZE)))[:, None]
        colours[some] = horizon + (surface - horizon) * clear
    colours = _smooth_edges(colours.reshape(*hits.inverse.shape, 3), hits)
    np.clip(colours, 0, 1, out=colours)
    colours *= 255
    colours += 0.5
    return colours.astype(np.uint8)


def _batches(pixels):
    """The pixels in parts whose intermediate results stay in the cache."""
    return (pixels[i : i + 8192] for i in range(0, len(pixels), 8192))


def _sky(direction, light):
    x, y, z = direction / np.linalg.norm(direction, axis=0)
    rise = np.clip(z, 0.0, 1)
    colour = np.array(light.horizon) + (np.array(light.zenith) - light.horizon) * (rise[:, None] ** 0.55)
    u, v = x / (rise + 0.16), y / (rise + 0.16)
    cloud = noise(u, v, 0.04) * 0.6 + noise(u + 3, v + 7, 0.012) * 0.25 + light.clouds - 0.5
    cover = np.clip(cloud * 0.55, 0, 0.85) * np.clip(rise * 9, 0, 1)
    white = 0.96 - 0.10 * np.clip(cloud - 1, 0, 1)
    return colour + (white[:, None] - colour) * cover[:, None]


def _floor(view, pixels, inverse, ground, light, shadow):
    depth = 1 / inverse[pixels]
    x, y, z = view.directions(pixels) * depth
    slant = np.sqrt(np.maximum(np.hypot(x, y), 1) / np.abs(z))
    footprint = depth * slant * np.float32(1 / view.focal)
    x, y = x + np.float32(view.origin[0] - ground.origin[0]), y + np.float32(view.origin[1] - ground.origin[1])
    cover = ground.coverage(x + ground.origin[0], y + ground.origin[1], footprint)
    fine = noise(x, y, 0.03) * np.clip(1.5 - footprint / 0.10, 0, 1)
    broad = noise(y, x, 0.45) * np.clip(1.5 - footprint / 2, 0, 1)
    road, white, yellow, lawn = (channel[:, None] for channel in cover.T)

    patch, lot = grid(x, y, (np.float32(7.0), np.float32(4.6)), (0.62, 0.5), footprint, 3)
    cracks = np.clip(np.abs(noise(x + 31, y, 0.16)) * -14 + 0.55, 0, 1) * np.clip(1.5 - footprint / 0.08, 0, 1)
    tar = 0.34 + 0.035 * broad + 0.035 * fine - 0.08 * patch * (lot[:, 0] > 0.3) - 0.10 * cracks
    slab, tone = grid(x, y, (np.float32(0.9), np.float32(0.9)), (0.965, 0.965), footprint, 5)
    paving = (0.56 + 0.03 * broad + 0.03 * fine + 0.09 * tone[:, 0]) * (0.72 + 0.28 * slab)
    grass = 0.34 + 0.05 * broad + 0.10 * fine
    colour = paving[:, None] * np.array([1.03, 1.0, 0.95], np.float32)
    colour += (grass[:, None] * np.array([0.85, 1.08, 0.52], np.float32) - colour) * lawn
    colour += (tar[:, None] * np.array([1.0, 1.0, 1.02], np.float32) - colour) * road
    worn = np.clip(0.90 + 0.10 * fine + 0.12 * broad, 0.35, 1)[:, None]
    stone = 0.80 + 0.05 * fine[:, None]
    colour += (stone * np.where(road > 0.5, 1.06, 0.80) - colour) * white * worn
    colour += (np.array([0.84, 0.62, 0.12], np.float32) * stone * 1.2 - colour) * yellow * worn
    lit = light.ambient + light.direct * light.sun[2] * (1 - shadow[pixels])
    return colour * lit[:, None]


def _face_rows(hits, light):
    """(faces, 22) float32: pattern axes 0–5 and start 6–7, cells 8–9, looks 10–20, light 21."""
    facing = np.maximum(hits.normals @ np.array(light.sun), 0)
    lit = light.ambient * (0.86 + 0.14 * hits.normals[:, 2]) + light.direct * facing
    table = [hits.tangents.reshape(-1, 6), hits.corners, hits.cells, hits.looks, lit[:, None]]
    return np.concatenate(table, axis=1).astype(np.float32)


def _faces(view, pixels, inverse, face, seeds, faces):
    number = face[pixels]
    depth = 1 / inverse[pixels]
    ray = view.directions(pixels) * depth
    seed = seeds[number]
    row = np.ascontiguousarray(faces[number].T)
    u = row[0] * ray[0] + row[1] * ray[1] + row[2] * ray[2] + row[6]
    v = row[3] * ray[0] + row[4] * ray[1] + row[5] * ray[2] + row[7]
    footprint = depth * np.float32(1.2 / view.focal)
    colour, inner, fill, jitter, hue, grain = row[10:13], row[13:16], row[16:18], row[18], row[19], row[20]
    coverage, random = grid(u, v, row[8:10], fill, footprint, seed)
    inner = inner * (1 + 2 * jitter * random[:, 3]) + hue * random[:, :3].T
    _panes(inner, u, v, row[8:10], jitter, footprint, seed)
    colour = colour + (np.clip(inner, 0.02, 1) - colour) * coverage
    shift = (seed % 251).astype(np.float32)
    fine = noise(u + shift, v, 0.035) * np.clip(1.5 - footprint / 0.10, 0, 1)
    broad = noise(v + shift, u, 0.30) * np.clip(1.5 - footprint / 1.0, 0, 1)
    return (colour * (row[21] * (1 + grain * (0.75 * fine + 0.4 * broad)))).T


def _panes(inner, u, v, cells, jitter, footprint, seed):
    """What is behind large windows, seen from near: a finer grid inside the rectangles, added to `inner` (3, n)."""
    rich = np.flatnonzero((jitter >= 0.55) & (np.minimum(*cells) > 25 * footprint) & (np.minimum(*cells) > 0.7))
    if len(rich):
        parts = cells[:, rich] / np.array([[4], [3]], np.float32)
        coverage, random = grid(u[rich], v[rich], parts, (0.9, 0.9), footprint[rich], seed[rich] + 7)
        inner[:, rich] *= 0.75 + coverage * (0.25 + 0.5 * random[:, 0])
        inner[:, rich] += 0.10 * coverage * random[:, 1:].T


def _shadow(view, hits, light, shadows):
    """(H, W) how much of the sun is kept from the ground, 0 to 1, with a soft edge."""
    dark = np.zeros(view.shape, dtype=np.float32)
    slope = np.array(light.sun[:2]) / light.sun[2]
    to_ground = np.array([0, 0, -1 / view.origin[2]])
    for item in shadows:
        vertices = item.body.vertices @ item.rotation.T + item.position
        flat = vertices[:, :2] - np.maximum(vertices[:, 2:], 0) * slope
        hull = convex_hull(flat)
        window = view.window(np.c_[hull, np.zeros(len(hull))])
        if window is None:
            continue
        side = np.roll(hull, -1, axis=0) - hull
        length = np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
        normal = np.c_[side[:, 1], -side[:, 0]] / length
        beyond = np.einsum("ei,ei->e", normal, hull) - normal @ view.origin[:2]
        edges = np.c_[normal, np.zeros(len(normal))] - beyond[:, None] * to_ground
        depth_times = view.linear(edges, window).max(axis=0)  # the distance outside the shadow, over the depth
        inverse = np.maximum(hits.inverse[window], 1e-3)
        np.maximum(dark[window], np.clip(0.5 - depth_times / inverse / 0.25, 0, 1), out=dark[window])
    return dark


_ROUND = np.arange(24) * (2 * np.pi / 24)
_ROUND = np.stack([np.cos(_ROUND), np.sin(_ROUND)], axis=1)


def convex_hull(points) -> np.ndarray:
    """Corners (M, 2) of the hull of (N, 2) points, counter-clockwise, but for corners flatter than 15 degrees."""
    farthest = np.argmax(_ROUND @ points.T, axis=1)
    return points[farthest[farthest != np.roll(farthest, 1)]]


def _smooth_edges(colours, hits):
    """Averages each outline pixel with its neighbours: the price of one ray a pixel, paid only where it shows."""
    face = np.where(hits.inverse > 0, hits.face, -2)
    edge = np.zeros(face.shape, dtype=bool)
    across, down = face[:, 1:] != face[:, :-1], face[1:] != face[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    edge[[0, -1]] = edge[:, [0, -1]] = False
    rows, columns = np.nonzero(edge)
    smooth = 0.36 * colours[rows, columns]
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            if dr or dc:
                smooth += (0.11 if dr == 0 or dc == 0 else 0.05) * colours[rows + dr, columns + dc]
    colours[rows, columns] = smooth
    return colours
