"""Which surface each ray of a camera or a LiDAR meets, and how far away it is.

For rays `origin + t · direction` the inverse distance `1/t` to a plane is linear in the direction, so over a picture
it costs an addition a pixel. A ray is inside a convex solid while
`max(planes seen from inside) <= 1/t <= min(planes seen from outside)`; it enters at the upper end.
"""

from dataclasses import dataclass

import numpy as np

from .solids import Body

NEAR = 0.2  # metres; nothing is drawn closer to a sensor


@dataclass(frozen=True)
class Placed:
    """A body somewhere in the world. `owner` is the number of the annotated object it belongs to, -1 for scenery."""

    body: Body
    rotation: np.ndarray  # (3, 3) body to world
    position: np.ndarray  # (3,) its centre, metres
    owner: int = -1
    seed: int = 0
    kind: str = ""  # what scenery it is


class Pinhole:
    """The pixels of a camera. Distances along its rays are depths, because directions have z = 1 in its frame."""

    def __init__(self, world_T_cam: np.ndarray, intrinsics: np.ndarray, width: int, height: int):
        self.shape = (height, width)
        self.origin = world_T_cam[:3, 3]
        self.focal = intrinsics[0, 0]
        self._cam_R_world = world_T_cam[:3, :3].T
        self._intrinsics = intrinsics
        self._direction_of = world_T_cam[:3, :3] @ np.linalg.inv(intrinsics)
        corners = np.array([[u, v, 1.0] for u in (0, width) for v in (0, height)])
        self.stretch = np.linalg.norm(corners @ self._direction_of.T, axis=1).max()  # longest direction
        self._u, self._v = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)

    def candidates(self, centres, radii) -> np.ndarray:
        """Whether spheres can be in the picture."""
        x, y, z = self._cam_R_world @ (centres - self.origin).T
        height, width = self.shape
        slope = np.hypot(width, height) / self.focal  # wider than any half angle
        return (z + radii > NEAR) & (np.hypot(x, y) <= slope * np.maximum(z, 0) + radii * (1 + slope))

    def window(self, vertices) -> tuple[slice, slice] | None:
        """The part of the picture the hull of (V, 3) points can touch."""
        points = (vertices - self.origin) @ self._cam_R_world.T
        ahead = points[:, 2] >= NEAR
        if not ahead.any():
            return None
        kept = points[ahead]
        if not ahead.all():  # where the hull crosses the near plane, it does so between two of its points
            behind = points[~ahead]
            share = (NEAR - behind[:, None, 2]) / (kept[None, :, 2] - behind[:, None, 2])
            crossing = behind[:, None] + share[..., None] * (kept[None] - behind[:, None])
            kept = np.concatenate([kept, crossing.reshape(-1, 3)])
        pixels = (kept / kept[:, 2:]) @ self._intrinsics.T
        low = np.ceil(pixels[:, :2].min(0) - 1e-3).clip(0, 1e6).astype(int)
        high = np.floor(pixels[:, :2].max(0) + 1e-3).clip(-1, 1e6).astype(int) + 1
        columns, rows = slice(low[0], min(high[0], self.shape[1])), slice(low[1], min(high[1], self.shape[0]))
        return (rows, columns) if columns.start < columns.stop and rows.start < rows.stop else None

    def linear(self, coefficients, window) -> np.ndarray:
        """(F, h, w) values of `coefficients · direction` for (F, 3) coefficients in the world frame."""
        a, b, c = (coefficients @ self._direction_of).astype(np.float32).T
        rows, columns = window
        return (a[:, None] * self._u[columns])[:, None] + (b[:, None] * self._v[rows] + c[:, None])[:, :, None]

    def directions(self, pixels) -> np.ndarray:
        """(3, n) world directions of flat pixel numbers."""
        v, u = np.divmod(pixels, self.shape[1])
        a, b, c = self._direction_of.T.astype(np.float32)
        return a[:, None] * u.astype(np.float32) + b[:, None] * v.astype(np.float32) + c[:, None]


class Scanner:
    """The beams of a spinning LiDAR: (rings, steps) unit directions, all fired at one moment."""

    def __init__(self, world_T_lidar: np.ndarray, elevations: np.ndarray, steps: int):
        self.shape = (len(elevations), steps)
        self.origin = world_T_lidar[:3, 3]
        self.stretch = 1.0
        self._lidar_R_world = world_T_lidar[:3, :3].T
        azimuth = (np.arange(steps) + 0.5) * (2 * np.pi / steps) - np.pi
        level, rise = np.cos(elevations)[:, None], np.sin(elevations)[:, None]
        self.local = np.stack(
            np.broadcast_arrays(level * np.cos(azimuth), level * np.sin(azimuth), rise), axis=-1
        ).astype(np.float32)  # (rings, steps, 3) in the sensor's frame

    def candidates(self, centres, radii) -> np.ndarray:
        return np.linalg.norm(centres - self.origin, axis=1) - radii < 110

    def window(self, vertices) -> tuple[slice, slice] | None:
        x, y = ((vertices - self.origin) @ self._lidar_R_world.T)[:, :2].T
        azimuth = np.arctan2(y, x)
        low, high = azimuth.min(), azimuth.max()
        if high - low > np.pi:  # round the seam, or round the sensor
            return slice(0, self.shape[0]), slice(0, self.shape[1])
        first, last = (np.array([low, high]) + np.pi) * self.shape[1] / (2 * np.pi)
        columns = slice(max(int(first) - 1, 0), min(int(last) + 2, self.shape[1]))
        return slice(0, self.shape[0]), columns

    def linear(self, coefficients, window) -> np.ndarray:
        local = (coefficients @ self._lidar_R_world.T).astype(np.float32)
        return np.moveaxis(self.local[window] @ local.T, -1, 0)


@dataclass
class Hits:
    """What the rays of a view meet, and the faces of everything that was near enough to look at."""

    inverse: np.ndarray  # (H, W) float32, 1 / distance; 0 where nothing is met
    face: np.ndarray  # (H, W) int32 number of the face, -1 for the ground and for nothing
    owner: np.ndarray  # (faces,) the annotated object, -1 for scenery
    normals: np.ndarray  # (faces, 3) world
    tangents: np.ndarray  # (faces, 2, 3) world
    corners: np.ndarray  # (faces, 2) pattern coordinates of the viewpoint
    cells: np.ndarray  # (faces, 2)
    looks: np.ndarray  # (faces, 11)
    seeds: np.ndarray  # (faces,)
    visible: np.ndarray  # (objects,) rays that end on each annotated object
    alone: np.ndarray  # (objects,) rays that would if nothing else were there


def cast(view, placed: list[Placed], objects: int, reach: float = 400.0, ground_hides: bool = True) -> Hits:
    """Follows every ray of `view` to the nearest of the bodies and the ground at z = 0.

    Args:
        view: a `Pinhole` or a `Scanner`.
        placed: the bodies.
        objects: how many annotated objects there are.
        reach: metres beyond which the ground is not drawn.
        ground_hides: False = bodies are seen through the ground, for boxes of a real road, which is not flat.
    """
    full = (slice(0, view.shape[0]), slice(0, view.shape[1]))
    floor = view.linear(np.array([[0.0, 0.0, -1 / view.origin[2]]]), full)[0]
    floor[floor < 1 / reach] = 0
    inverse = floor if ground_hides else np.zeros_like(floor)
    face = np.full(view.shape, -1, dtype=np.int32)
    alone = np.zeros(objects, dtype=np.int64)
    tables, count = [], 0
    for item in _nearest_first(view, placed):
        found = _body_hits(view, item, inverse)
        if found is None:
            continue
        window, entry, number = found
        if item.owner >= 0:
            alone[item.owner] += np.count_nonzero(entry)
        closer = entry > inverse[window]
        if closer.any():
            np.copyto(inverse[window], entry, where=closer)
            np.copyto(face[window], number + count, where=closer)
            tables.append(_face_table(view, item))
            count += len(item.body.offsets)
    np.copyto(inverse, floor, where=inverse == 0)
    columns = [np.concatenate(column) for column in zip(*tables)] if tables else _face_table(view, None)
    met = face[face >= 0]
    visible = np.bincount(columns[0][met] + 1, minlength=objects + 1)[1:]
    return Hits(inverse, face, *columns, visible, alone)


def _nearest_first(view, placed):
    if not placed:
        return []
    centres = np.array([item.position for item in placed])
    radii = np.array([0.5 * np.linalg.norm(item.body.size) for item in placed]) + 0.5
    distance = np.linalg.norm(centres - view.origin, axis=1) - radii
    kept = np.flatnonzero(view.candidates(centres, radii))
    return [placed[i] for i in kept[np.argsort(distance[kept], kind="stable")]]


def _body_hits(view, item: Placed, inverse):
    """(window, inverse distance of the entry or 0, number of the face) of a body taken alone; None if it is not seen.

    Scenery that cannot be nearer than what is there already is left out; annotated objects are always counted.
    """
    body = item.body
    vertices = body.vertices @ item.rotation.T + item.position
    window = view.window(vertices)
    if window is None:
        return None
    if item.owner < 0:
        nearest = max(np.linalg.norm(item.position - view.origin) - 0.5 * np.linalg.norm(body.size) - 0.5, NEAR)
        if inverse[window].min() > view.stretch / nearest:
            return None
    origin = (view.origin - item.position) @ item.rotation
    gap = body.offsets - body.normals @ origin
    coefficients = (body.normals / np.where(np.abs(gap) < 1e-9, 1e-9, gap)[:, None]) @ item.rotation.T
    rows, columns = window
    entry = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=np.float32)
    number = np.zeros(entry.shape, dtype=np.int32)
    for solid in range(len(body.starts) - 1):
        first, last = body.vertex_starts[solid : solid + 2]
        part = view.window(vertices[first:last])
        faces = np.arange(*body.starts[solid : solid + 2])
        outside, inside = faces[gap[faces] < 0], faces[gap[faces] >= 0]
        if part is None or not len(outside):
            continue
        part_rows, part_columns = part
        local = (
            slice(part_rows.start - rows.start, part_rows.stop - rows.start),
            slice(part_columns.start - columns.start, part_columns.stop - columns.start),
        )
        _solid_hits(view, coefficients, outside, inside, part, entry[local], number[local])
    return window, entry, number


def _solid_hits(view, coefficients, outside, inside, window, entry, number):
    """Puts a solid's hits into `entry` and `number` where they are nearer than what those hold."""
    limits = view.linear(coefficients[outside], window)
    upper, which = limits[0], np.full(entry.shape, outside[0], dtype=np.int32)
    for other, face in zip(limits[1:], outside[1:]):
        lower = other < upper
        np.copyto(upper, other, where=lower)
        np.copyto(which, face, where=lower)
    better = upper > entry
    if len(inside):
        better &= upper >= view.linear(coefficients[inside], window).max(axis=0)
    better &= upper < 1 / NEAR
    np.copyto(entry, upper, where=better)
    np.copyto(number, which, where=better)


def _face_table(view, item: Placed | None):
    """One row a face: owner, normal, tangents, pattern coordinates of the viewpoint, cells, looks, seed."""
    if item is None:
        shapes = ((), (3,), (2, 3), (2,), (2,), (11,), ())
        return [np.zeros((0, *shape), dtype=np.int64 if shape == () else np.float64) for shape in shapes]
    body, rotation = item.body, item.rotation
    faces = len(body.offsets)
    origin = (view.origin - item.position) @ rotation
    return (
        np.full(faces, item.owner),
        body.normals @ rotation.T,
        body.tangents @ rotation.T,
        body.tangents @ origin - body.corners,
        body.cells,
        body.looks,
        item.seed * 131 + np.arange(faces),
    )
