"""Bodies of a street's furniture: lamps, signals, walls, hoardings and speed bumps."""

from functools import lru_cache

import numpy as np

from .shapes import CLOTHES, PAINTS, STEEL, WALLS, pick
from .solids import Body, Look, box, cylinder, frustum


@lru_cache(maxsize=256)
def lamp_post(height: float, seed: int) -> Body:
    """A street lamp; its arm reaches along +x."""
    sign = Look((0.12, 0.25, 0.55), (0.9, 0.9, 0.9), columns=4, rows=2, fill=(0.6, 0.5), jitter=0.9, hue=0.4)
    rng = np.random.default_rng([seed, 17])
    parts = [
        cylinder(2, (0, 0, 0), 0.09, height, Look((0.30, 0.32, 0.33)), sides=8),
        box((0, 1.6), (-0.05, 0.05), (height / 2 - 0.12, height / 2 - 0.02), Look((0.30, 0.32, 0.33))),
        box((1.1, 1.8), (-0.12, 0.12), (height / 2 - 0.2, height / 2 - 0.1), Look((0.85, 0.85, 0.80))),
    ]
    if rng.random() < 0.6:
        z = 2.6 - height / 2
        parts.append(box((0.08, 0.12), (-0.45, 0.45), (z, z + 0.6), sign))
    return Body(parts, (0.9, 3.6, height))


def billboard(width: float, seed: int) -> Body:
    """A hoarding with a picture no other one has, facing ±x, 4 m tall."""
    rng = np.random.default_rng([seed, 19])
    picture = Look(pick(PAINTS, rng), pick(CLOTHES, rng), 10, 5, (1.2, 1.2), jitter=0.6, hue=0.9)
    parts = [cylinder(2, (0, side * 0.4 * width, -1.0), 0.1, 2.0, Look(STEEL), sides=6) for side in (-1, 1)] + [
        box((-0.1, 0.1), (-width / 2, width / 2), (0.0, 2.0), {"front": picture, "back": picture, "all": Look(STEEL)})
    ]
    return Body(parts, (width, 0.3, 4.0))


def wall(width: float, height: float, seed: int) -> Body:
    """A brick or concrete wall 0.3 m thick with a coping, facing ±x."""
    rng = np.random.default_rng([seed, 23])
    colour = pick(WALLS, rng)
    bricks = Look(colour, tuple(0.85 * c for c in colour), width / 0.45, height / 0.2, (0.94, 0.88), 0.3, 0.05, 0.2)
    return Body(
        [
            box((-0.11, 0.11), (-width / 2, width / 2), (-height / 2, height / 2 - 0.08), bricks),
            box((-0.15, 0.15), (-width / 2, width / 2), (height / 2 - 0.08, height / 2), Look(pick(WALLS, rng))),
        ],
        (width, 0.3, height),
    )


def bump_body(width: float, length: float, height: float) -> Body:
    """A speed bump across a road that runs along x, in yellow and black."""
    stripes = Look((0.10, 0.10, 0.11), (0.85, 0.66, 0.12), columns=round(width / 0.6), fill=(0.5, 1.2), grain=0.12)
    low, high = (-length / 2, length / 2, -width / 2, width / 2), (-length / 5, length / 5, -width / 2, width / 2)
    return Body([frustum(low, high, (-height / 2, height / 2), {"all": stripes})], (width, length, height))


LAMPS = {"red": (0.95, 0.10, 0.08), "yellow": (0.98, 0.75, 0.10), "green": (0.10, 0.90, 0.45)}
SIGNAL_HEIGHT = 3.6


def lamp_heights() -> dict[str, float]:
    """Metres above the ground of a traffic light's lamps, by colour."""
    return {name: SIGNAL_HEIGHT - 0.18 - 0.32 * place for place, name in enumerate(LAMPS)}


@lru_cache
def signal_post(state: str) -> Body:
    """A traffic light that faces along +x with the lamp of `state` lit."""
    head = Look((0.07, 0.07, 0.08))
    parts = [
        cylinder(2, (0, 0, -0.45), 0.07, SIGNAL_HEIGHT - 0.9, Look((0.30, 0.32, 0.33)), sides=8),
        box((-0.14, 0.10), (-0.17, 0.17), (SIGNAL_HEIGHT / 2 - 1.0, SIGNAL_HEIGHT / 2), head),
    ]
    for name, height in lamp_heights().items():
        middle = height - SIGNAL_HEIGHT / 2
        lit = LAMPS[name] if name == state else tuple(0.15 * c for c in LAMPS[name])
        parts.append(box((0.10, 0.15), (-0.12, 0.12), (middle - 0.12, middle + 0.12), Look(lit, grain=0.02)))
    return Body(parts, (0.34, 0.34, SIGNAL_HEIGHT))
