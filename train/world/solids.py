"""Convex solids with a look: the only kind of body the world is made of.

A solid is the set of points with `normals · x <= offsets`, which a camera and a LiDAR meet by the same few additions
and comparisons (see `casting.py`).
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Look:
    """How a face is painted: a ground colour, and a grid of rectangles of a second one that vary from cell to cell.

    Windows in a wall, lamps on a car, stripes on a barrier, leaves and bricks are all such grids.
    """

    colour: tuple[float, float, float]
    inner: tuple[float, float, float] | None = None
    columns: float = 1  # cells over the width of the face
    rows: float = 1
    fill: tuple[float, float] = (0.0, 0.0)  # part of a cell the rectangle takes; above 1 the rectangles touch
    jitter: float = 0.0  # how much the rectangles differ in brightness
    hue: float = 0.0  # and in colour
    grain: float = 0.08  # contrast of the noise over the whole face

    def numbers(self) -> list[float]:
        return [*self.colour, *(self.inner or self.colour), *self.fill, self.jitter, self.hue, self.grain]


@dataclass
class Solid:
    normals: np.ndarray  # (F, 3) unit, outward
    offsets: np.ndarray  # (F,)
    vertices: np.ndarray  # (V, 3) their hull contains the solid
    looks: list[Look]  # F
    tangents: np.ndarray = field(init=False)  # (F, 2, 3) axes of the face's pattern, the first one level
    corners: np.ndarray = field(init=False)  # (F, 2) where the pattern starts
    cells: np.ndarray = field(init=False)  # (F, 2) metres

    def __post_init__(self):
        x, y, z = self.normals.T
        length = np.hypot(x, y)
        steep, scale = length > 1e-6, np.maximum(length, 1e-6)
        across, ahead = np.where(steep, -y / scale, 0.0), np.where(steep, x / scale, 1.0)  # vertical × normal
        self.tangents = np.empty((len(x), 2, 3))
        self.tangents[:, 0] = np.stack([across, ahead, np.zeros(len(x))], axis=1)
        self.tangents[:, 1] = np.stack([-z * ahead, z * across, x * ahead - y * across], axis=1)  # normal × level
        along = self.tangents @ self.vertices.T
        on_face = np.abs(self.normals @ self.vertices.T - self.offsets[:, None]) < 1e-6
        on_face |= ~on_face.any(axis=1, keepdims=True)  # the vertices of a ball only bound it
        low = np.where(on_face[:, None], along, np.inf).min(axis=2)
        high = np.where(on_face[:, None], along, -np.inf).max(axis=2)
        self.corners = low
        self.cells = (high - low) / [[look.columns, look.rows] for look in self.looks]


@dataclass
class Body:
    """Solids in one frame: x forward, y left, z up, the origin at the centre of the box of `size` that holds them."""

    solids: list[Solid]
    size: tuple[float, float, float]  # width, length, height, as nuScenes orders them

    def __post_init__(self):
        solids = self.solids
        self.starts = np.cumsum([0] + [len(solid.offsets) for solid in solids])
        self.normals = np.concatenate([solid.normals for solid in solids])
        self.offsets = np.concatenate([solid.offsets for solid in solids])
        self.tangents = np.concatenate([solid.tangents for solid in solids])
        self.corners = np.concatenate([solid.corners for solid in solids])
        self.cells = np.concatenate([solid.cells for solid in solids])
        self.looks = np.array([look.numbers() for solid in solids for look in solid.looks])
        self.vertices = np.concatenate([solid.vertices for solid in solids])
        self.vertex_starts = np.cumsum([0] + [len(solid.vertices) for solid in solids])


def frustum(low, high, z, looks: dict[str, Look]) -> Solid:
    """A box whose top may be smaller than its bottom.

    Args:
        low, high: (x0, x1, y0, y1) of the bottom and of the top.
        z: (bottom, top).
        looks: by face (front, back, left, right, top, bottom), with "all" for those not named.
    """
    (a, b, c, d), (e, f, g, h), (z0, z1) = low, high, z
    vertices = np.array(
        [[a, c, z0], [b, c, z0], [b, d, z0], [a, d, z0], [e, g, z1], [f, g, z1], [f, h, z1], [e, h, z1]], dtype=float
    )
    rise = z1 - z0
    normals = np.array(
        [
            [rise, 0, b - f], [-rise, 0, e - a], [0, rise, d - h], [0, -rise, g - c], [0, 0, 1], [0, 0, -1],
        ],
        dtype=float,
    )  # fmt: skip
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = np.einsum("fi,fi->f", normals, vertices[[1, 0, 2, 0, 4, 0]])
    names = ("front", "back", "left", "right", "top", "bottom")
    return Solid(normals, offsets, vertices, [looks.get(name, looks.get("all")) for name in names])


def box(x, y, z, look: Look | dict[str, Look]) -> Solid:
    """A box from (low, high) along each axis."""
    looks = look if isinstance(look, dict) else {"all": look}
    return frustum((*x, *y), (*x, *y), z, looks)


def cylinder(axis: int, centre, radius: float, length: float, look: Look, cap: Look | None = None, sides=10) -> Solid:
    """A regular prism about an axis (0, 1, 2); its corners lie on the circle of `radius`."""
    others = [i for i in range(3) if i != axis]
    middle = (np.arange(sides) + 0.5) * 2 * np.pi / sides
    edge = np.arange(sides) * 2 * np.pi / sides
    normals, vertices = np.zeros((sides + 2, 3)), np.zeros((2 * sides, 3))
    normals[:sides, others] = np.stack([np.cos(middle), np.sin(middle)], axis=1)
    normals[sides, axis], normals[sides + 1, axis] = 1.0, -1.0
    vertices[:, others] = np.tile(radius * np.stack([np.cos(edge), np.sin(edge)], axis=1), (2, 1))
    vertices[:sides, axis], vertices[sides:, axis] = length / 2, -length / 2
    offsets = np.r_[np.full(sides, radius * np.cos(np.pi / sides)), length / 2, length / 2]
    vertices += centre
    return Solid(normals, offsets + normals @ np.asarray(centre, float), vertices, [look] * sides + [cap or look] * 2)


_BALL = np.array([p for p in np.ndindex(3, 3, 3) if p != (1, 1, 1)], dtype=float) - 1
_BALL /= np.linalg.norm(_BALL, axis=1, keepdims=True)


def ball(centre, radii, look: Look) -> Solid:
    """An ellipsoid cut into 26 faces; every face touches the ellipsoid from inside its box."""
    radii = np.asarray(radii, dtype=float)
    normals = _BALL / radii
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = np.linalg.norm(normals * radii, axis=1)
    vertices = (np.array(list(np.ndindex(2, 2, 2))) * 2.0 - 1) * radii + centre
    return Solid(normals, offsets + normals @ np.asarray(centre, float), vertices, [look] * len(normals))
