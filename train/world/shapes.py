"""Bodies for nuScenes' categories and for scenery, fitted to any box size.

Every body stays 1.5 cm inside its box, so that a LiDAR point on its surface is inside the box after rounding.
"""

from functools import lru_cache

import numpy as np

from .solids import Body, Look, ball, box, cylinder, frustum

MARGIN = 0.015
PAINTS = np.array(
    [
        [0.82, 0.83, 0.84], [0.55, 0.57, 0.59], [0.16, 0.17, 0.19], [0.62, 0.10, 0.10], [0.10, 0.19, 0.45],
        [0.83, 0.62, 0.11], [0.13, 0.32, 0.22], [0.75, 0.72, 0.64], [0.88, 0.88, 0.86], [0.35, 0.13, 0.20],
    ]
)  # fmt: skip
CLOTHES = np.array(
    [
        [0.75, 0.16, 0.14], [0.15, 0.28, 0.60], [0.86, 0.84, 0.80], [0.10, 0.10, 0.12], [0.20, 0.50, 0.30],
        [0.88, 0.66, 0.15], [0.45, 0.25, 0.50], [0.42, 0.44, 0.46], [0.20, 0.55, 0.62],
    ]
)  # fmt: skip
WALLS = np.array(
    [
        [0.60, 0.34, 0.26], [0.72, 0.64, 0.52], [0.68, 0.69, 0.70], [0.48, 0.42, 0.38], [0.80, 0.76, 0.68],
        [0.52, 0.57, 0.62], [0.64, 0.48, 0.36], [0.74, 0.55, 0.44],
    ]
)  # fmt: skip
GLASS, RUBBER, STEEL = (0.10, 0.13, 0.17), (0.05, 0.05, 0.055), (0.42, 0.43, 0.45)
WHITE_LAMP, RED_LAMP = (0.98, 0.96, 0.85), (0.70, 0.06, 0.05)
TYRE, HUB = Look(RUBBER), Look(RUBBER, (0.55, 0.56, 0.58), fill=(0.5, 0.5), jitter=0.3)


def body_for(category: str, size, seed: int) -> Body:
    """The body of an annotated object.

    Args:
        category: nuScenes' category name.
        size: width, length, height in metres.
        seed: chooses colours and details; the same seed gives the same body.
    """
    rng = np.random.default_rng([seed, 7])
    inner = tuple(max(extent - 2 * MARGIN, 0.02) for extent in size)
    for prefix, build in _BUILDERS.items():
        if category.startswith(prefix):
            return Body(build(*inner, rng), tuple(size))
    return Body(_crate(*inner, rng), tuple(size))


def pick(colours, rng) -> tuple[float, float, float]:
    return tuple((colours[rng.integers(len(colours))] + rng.uniform(-0.04, 0.04, 3)).clip(0.03, 0.95).tolist())


def _wheels(length, width, height, radius, places):
    """Wheels standing on the bottom of the box, at parts of its length from the middle."""
    thick = min(0.24, 0.16 * width)
    return [
        cylinder(1, (at * length, side * (width - thick) / 2, radius - height / 2), radius, thick, TYRE, HUB)
        for at in places
        for side in (-1, 1)
    ]


def _ends(paint, rows=1.0, height=0.3):
    """Faces with lamps: white in front, red behind."""
    lamp = dict(columns=2, rows=rows, fill=(0.42, height), jitter=0.1)
    return {"front": Look(paint, WHITE_LAMP, **lamp), "back": Look(paint, RED_LAMP, **lamp)}


def _car(w, l, h, rng):
    paint = pick(PAINTS, rng)
    side = Look(paint, tuple(0.72 * c for c in paint), columns=4, fill=(0.94, 0.80), jitter=0.08)
    glass = Look(paint, GLASS, fill=(0.86, 0.82))
    doors = Look(paint, GLASS, columns=2, fill=(0.88, 0.80))
    tail = rng.choice([-0.46, -0.40, -0.33])  # estate, hatchback, saloon
    looks = {**_ends(paint), "left": side, "right": side, "all": Look(paint)}
    windows = {"front": glass, "back": glass, "left": doors, "right": doors, "all": Look(paint)}
    radius = min(0.21 * h, 0.36)
    return [
        box((-l / 2, l / 2), (-w / 2, w / 2), (-0.34 * h, 0.06 * h), looks),
        box((-0.49 * l, 0.49 * l), (-0.48 * w, 0.48 * w), (-0.40 * h, -0.34 * h), Look((0.07, 0.07, 0.08))),
        frustum(
            (-0.48 * l, 0.24 * l, -0.47 * w, 0.47 * w), (tail * l, 0.08 * l, -0.40 * w, 0.40 * w),
            (0.06 * h, 0.5 * h), windows,
        ),
        *_wheels(l, w, h, radius, (-0.31, 0.31)),
    ]  # fmt: skip


def _cargo(rng, rows=5):
    """The faces of a lorry: a pattern no other one has on the sides, doors behind."""
    paint = pick(PAINTS, rng)
    doors = Look(paint, tuple(0.8 * c for c in paint), columns=2, fill=(0.92, 0.95), grain=0.12)
    side = Look(paint, pick(CLOTHES, rng), columns=9, rows=rows, fill=(1.2, 1.2), jitter=0.5, hue=0.3)
    return {"left": side, "right": side, "back": doors, "all": Look(paint)}


def _truck(w, l, h, rng):
    paint = pick(PAINTS, rng)
    glass = Look(paint, GLASS, rows=2, fill=(0.8, 0.72))
    front = Look(paint, GLASS, rows=2, fill=(0.86, 0.62))
    cab = {"front": front, "left": glass, "right": glass, "all": Look(paint)}
    nose = 0.5 * l - max(0.22 * l, min(1.9, 0.35 * l))
    return [
        box((nose, l / 2), (-0.48 * w, 0.48 * w), (-0.36 * h, 0.28 * h), cab),
        box((-l / 2, nose - 0.1), (-w / 2, w / 2), (-0.28 * h, 0.5 * h), _cargo(rng)),
        box((-0.48 * l, 0.48 * l), (-0.35 * w, 0.35 * w), (-0.38 * h, -0.28 * h),
            {**_ends(STEEL, 1, 0.5), "all": Look(STEEL)}),
        *_wheels(l, w, h, min(0.5, 0.2 * h), (-0.36, -0.2, 0.34)),
    ]  # fmt: skip


def _trailer(w, l, h, rng):
    return [
        box((-l / 2, l / 2), (-w / 2, w / 2), (-0.22 * h, 0.5 * h), _cargo(rng, 4)),
        box((-0.48 * l, 0.48 * l), (-0.3 * w, 0.3 * w), (-0.32 * h, -0.22 * h), Look(STEEL)),
        *_wheels(l, w, h, min(0.5, 0.16 * h), (-0.4, -0.29, -0.18)),
    ]  # fmt: skip


def _bus(w, l, h, rng):
    paint = pick(PAINTS, rng)
    count = max(round(l / 1.5), 3)
    side = Look(paint, GLASS, columns=count, fill=(0.9, 0.8), jitter=0.3)
    end = Look(paint, GLASS, fill=(0.9, 0.85))
    belt = Look(pick(CLOTHES, rng), pick(PAINTS, rng), columns=7, fill=(0.5, 0.6), jitter=0.4, hue=0.4)
    return [
        box((-l / 2, l / 2), (-w / 2, w / 2), (-0.38 * h, -0.05 * h),
            {"left": belt, "right": belt, **_ends(paint, 2, 0.4), "all": Look(paint)}),
        box((-l / 2, l / 2), (-w / 2, w / 2), (-0.05 * h, 0.36 * h),
            {"left": side, "right": side, "front": end, "back": end, "all": Look(paint)}),
        box((-l / 2, l / 2), (-w / 2, w / 2), (0.36 * h, 0.5 * h), Look(paint, fill=(0, 0))),
        *_wheels(l, w, h, min(0.5, 0.16 * h), (-0.3, 0.32)),
    ]  # fmt: skip


def _construction(w, l, h, rng):
    yellow, dark = (0.86, 0.62, 0.08), Look((0.14, 0.14, 0.15), RUBBER, columns=12, fill=(0.6, 1.2))
    cab = Look(yellow, GLASS, fill=(0.8, 0.75))
    hazard = Look(yellow, (0.08, 0.08, 0.08), columns=8, fill=(0.5, 1.2))
    return [
        box((-l / 2, 0.2 * l), (-w / 2, -0.26 * w), (-0.5 * h, -0.24 * h), dark),
        box((-l / 2, 0.2 * l), (0.26 * w, w / 2), (-0.5 * h, -0.24 * h), dark),
        box((-0.48 * l, 0.16 * l), (-0.42 * w, 0.42 * w), (-0.24 * h, 0.08 * h), {"back": hazard, "all": Look(yellow)}),
        box((-0.12 * l, 0.16 * l), (-0.05 * w, 0.42 * w), (0.08 * h, 0.5 * h), {"top": Look(yellow), "all": cab}),
        frustum((0.14 * l, 0.26 * l, -0.3 * w, -0.14 * w), (0.3 * l, 0.4 * l, -0.3 * w, -0.14 * w),
                (-0.1 * h, 0.46 * h), {"all": Look(yellow)}),
        frustum((0.30 * l, 0.5 * l, -0.4 * w, 0.0), (0.32 * l, 0.42 * l, -0.36 * w, -0.04 * w),
                (-0.42 * h, -0.1 * h), {"all": Look(STEEL)}),
    ]  # fmt: skip


def _cycle(w, l, h, rng, motor):
    """A two-wheeler. A tall box has a rider in it."""
    paint = pick(CLOTHES, rng)
    thick = (0.5 if motor else 0.12) * w
    radius = min((0.30 if motor else 0.34), 0.24 * l, 0.3 * h)
    floor = -0.5 * h
    frame = Look(paint, fill=(0, 0), grain=0.15)
    parts = [
        cylinder(1, (at * (l / 2 - radius), 0, floor + radius), radius, 0.6 * thick, TYRE, HUB, sides=14)
        for at in (-1, 1)
    ]
    saddle = min(0.62 * h, 0.95)
    parts += [
        frustum((-0.24 * l, 0.20 * l, -thick / 2, thick / 2), (-0.34 * l, 0.10 * l, -thick / 2, thick / 2),
                (floor + radius, floor + 0.88 * saddle), {"all": frame}),
        box((0.24 * l, 0.29 * l), (-w / 2, w / 2), (floor + saddle, floor + saddle + 0.06), Look(STEEL)),
        frustum((0.26 * l, 0.38 * l, -thick / 3, thick / 3), (0.22 * l, 0.30 * l, -thick / 3, thick / 3),
                (floor + radius, floor + saddle), {"front": Look(paint, WHITE_LAMP, rows=2, fill=(0.8, 0.4)),
                                                   "all": Look(STEEL)}),
    ]  # fmt: skip
    if h > 1.35:
        coat = pick(CLOTHES, rng)
        parts += [
            frustum((-0.16 * l, 0.04 * l, -0.3 * w, 0.3 * w), (-0.06 * l, 0.14 * l, -0.42 * w, 0.42 * w),
                    (floor + 0.85 * saddle, 0.34 * h), {"all": Look(coat, grain=0.2)}),
            ball((0.06 * l, 0, 0.42 * h), (0.08 * h, 0.07 * h, 0.08 * h), Look(pick(PAINTS, rng))),
        ]  # fmt: skip
    return parts


def _person(w, l, h, rng):
    coat, legs = pick(CLOTHES, rng), pick(CLOTHES * 0.6, rng)
    skin = tuple((np.array([0.72, 0.52, 0.40]) * rng.uniform(0.5, 1.15)).clip(0, 0.9))
    stripes = Look(coat, pick(CLOTHES, rng), rows=rng.integers(2, 5), fill=(1.2, 0.45), jitter=0.2, grain=0.2)
    step = 0.16 * l
    trousers = {"all": Look(legs, grain=0.2)}
    wide = min(w, 0.5 * h)
    parts = [
        frustum((s * step - 0.10 * l, s * step + 0.14 * l, y - 0.1 * wide, y + 0.1 * wide),
                (-0.11 * l, 0.11 * l, y - 0.12 * wide, y + 0.12 * wide), (-0.5 * h, -0.04 * h), trousers)
        for s, y in ((-1, -0.15 * wide), (1, 0.15 * wide))
    ]  # fmt: skip
    parts += [
        frustum((-0.16 * l, 0.16 * l, -0.30 * wide, 0.30 * wide), (-0.18 * l, 0.18 * l, -0.38 * wide, 0.38 * wide),
                (-0.08 * h, 0.33 * h), {"front": stripes, "back": stripes, "all": Look(coat, grain=0.2)}),
        frustum((0.02 * l, 0.3 * l, 0.38 * wide, 0.5 * wide), (-0.1 * l, 0.12 * l, 0.38 * wide, 0.5 * wide),
                (-0.06 * h, 0.31 * h), {"all": Look(coat)}),
        frustum((-0.3 * l, -0.02 * l, -0.5 * wide, -0.38 * wide), (-0.12 * l, 0.1 * l, -0.5 * wide, -0.38 * wide),
                (-0.06 * h, 0.31 * h), {"all": Look(coat)}),
        ball((0, 0, 0.43 * h), (0.066 * h, 0.056 * h, 0.07 * h), Look(skin)),
        ball((-0.01 * h, 0, 0.455 * h), (0.066 * h, 0.06 * h, 0.045 * h), Look(pick(PAINTS * 0.45, rng))),
    ]  # fmt: skip
    if rng.random() < 0.4:
        bag = pick(CLOTHES, rng)
        parts.append(box((-0.34 * l, -0.17 * l), (-0.2 * wide, 0.2 * wide), (0.05 * h, 0.3 * h), Look(bag, grain=0.2)))
    return parts


def _cone(w, l, h, rng):
    orange = (0.90, 0.33, 0.08)
    look = Look(orange, (0.92, 0.92, 0.90), rows=3, fill=(1.2, 0.4))
    return [
        box((-l / 2, l / 2), (-w / 2, w / 2), (-0.5 * h, -0.44 * h), Look((0.12, 0.12, 0.12))),
        frustum((-0.36 * l, 0.36 * l, -0.36 * w, 0.36 * w), (-0.06 * l, 0.06 * l, -0.06 * w, 0.06 * w),
                (-0.44 * h, 0.5 * h), {"all": look}),
    ]  # fmt: skip


def _barrier(w, l, h, rng):
    boards = Look((0.90, 0.90, 0.88), (0.82, 0.22, 0.10), columns=max(round(w / 0.5), 2), rows=2, fill=(0.5, 0.86))
    feet = [
        box((-l / 2, l / 2), (side * 0.4 * w - 0.06, side * 0.4 * w + 0.06), (-0.5 * h, -0.38 * h), Look(STEEL))
        for side in (-1, 1)
    ]
    return feet + [box((-0.14 * l, 0.14 * l), (-w / 2, w / 2), (-0.38 * h, 0.5 * h), boards)]


def _crate(w, l, h, rng):
    look = Look(pick(CLOTHES, rng), pick(PAINTS, rng), columns=3, rows=2, fill=(0.7, 0.6), jitter=0.4)
    return [box((-l / 2, l / 2), (-w / 2, w / 2), (-h / 2, h / 2), look)]


def _rack(w, l, h, rng):
    bar = Look(STEEL)
    count = max(int(l / 0.9), 2)
    places = np.linspace(-0.46, 0.46, count) * l
    return [box((x - 0.03, x + 0.03), (-0.4 * w, 0.4 * w), (-0.5 * h, 0.1 * h), bar) for x in places]


_BUILDERS = {
    "vehicle.car": _car,
    "vehicle.emergency.police": _car,
    "vehicle.emergency": _truck,
    "vehicle.truck": _truck,
    "vehicle.trailer": _trailer,
    "vehicle.bus": _bus,
    "vehicle.construction": _construction,
    "vehicle.bicycle": lambda *box: _cycle(*box, motor=False),
    "vehicle.motorcycle": lambda *box: _cycle(*box, motor=True),
    "human.pedestrian": _person,
    "movable_object.trafficcone": _cone,
    "movable_object.barrier": _barrier,
    "static_object.bicycle_rack": _rack,
}


def building(width: float, depth: float, height: float, seed: int) -> Body:
    """A house on the ground, shops below and windows above. `depth` runs along x, `width` along y."""
    rng = np.random.default_rng([seed, 11])
    wall, trim = pick(WALLS, rng), pick(WALLS, rng)
    pitch, floor, shop = rng.uniform(2.0, 3.6), rng.uniform(2.9, 3.6), rng.uniform(3.6, 4.4)
    fill = (rng.uniform(0.4, 0.8), rng.uniform(0.45, 0.7))
    glass = tuple(np.array([0.20, 0.25, 0.31]) * rng.uniform(0.6, 1.5))
    base = -height / 2

    def windows(extent):
        columns, rows = max(round(extent / pitch), 1), max(round((height - shop) / floor), 1)
        return Look(wall, glass, columns, rows, fill, jitter=0.9, hue=0.12, grain=0.16)

    def shops(extent):
        columns = max(round(extent / 4.5), 1)
        return Look(trim, (0.30, 0.28, 0.27), columns, 1, (0.84, 0.72), jitter=0.7, hue=0.22, grain=0.12)

    def signs(extent):
        return Look(trim, (0.5, 0.45, 0.45), max(round(extent / 1.1), 1), 1, (0.9, 0.7), jitter=0.6, hue=0.6)

    def walls(look):
        across, along = look(width), look(depth)
        return {"front": across, "back": across, "left": along, "right": along, "all": Look((0.4, 0.4, 0.4))}

    x, y = (-depth / 2, depth / 2), (-width / 2, width / 2)
    out = 0.12
    parts = [
        box(x, y, (base, base + shop - 0.8), walls(shops)),
        box((x[0] - out, x[1] + out), (y[0] - out, y[1] + out), (base + shop - 0.8, base + shop), walls(signs)),
        box(x, y, (base + shop, height / 2 - 0.5), walls(windows)),
        box((x[0] - 0.2, x[1] + 0.2), (y[0] - 0.2, y[1] + 0.2), (height / 2 - 0.5, height / 2), Look(trim, grain=0.2)),
    ]
    return Body(parts, (width + 0.4, depth + 0.4, height))


@lru_cache(maxsize=1024)
def tree(height: float, seed: int) -> Body:
    """A tree whose leaves begin above 0.42 of its height."""
    rng = np.random.default_rng([seed, 13])
    green = tuple(np.array([0.20, 0.34, 0.12]) * rng.uniform(0.7, 1.25, 3))
    leaves = Look(green, tuple(1.3 * c for c in green), 13, 13, (0.7, 0.7), jitter=0.6, hue=0.08, grain=0.75)
    trunk = Look((0.30, 0.23, 0.17), (0.22, 0.17, 0.12), columns=3, rows=12, fill=(0.6, 0.8), jitter=0.4, grain=0.3)
    spread = 0.2 * height
    parts = [cylinder(2, (0, 0, -0.25 * height), 0.035 * height + 0.04, 0.5 * height, trunk, sides=8)]
    for centre in ((0, 0, 0.30), (0.5, 0.3, 0.16), (-0.45, 0.4, 0.20), (0.1, -0.55, 0.14)):
        middle = np.array([centre[0] * spread, centre[1] * spread, centre[2] * height]) + rng.normal(0, 0.1, 3)
        parts.append(ball(middle, spread * rng.uniform([0.7, 0.7, 0.6], [0.95, 0.95, 0.8]), leaves))
    return Body(parts, (2.2 * spread, 2.2 * spread, height))
