"""Curves in the plane, motion along them, and whether two moving boxes meet."""

import numpy as np

STEP = 0.05  # seconds between the stored points of a motion


class Path:
    """A polyline with a smooth heading, by arc length in metres."""

    def __init__(self, points):
        points = np.asarray(points, dtype=float)
        length = np.linalg.norm(np.diff(points, axis=0), axis=1)
        points = points[np.r_[True, length > 1e-6]]
        side = np.diff(points, axis=0)
        self.points = points
        self.arc = np.r_[0, np.cumsum(np.linalg.norm(side, axis=1))]
        heading = np.unwrap(np.arctan2(side[:, 1], side[:, 0]))
        self.heading = np.r_[heading[0], (heading[1:] + heading[:-1]) / 2, heading[-1]]

    @property
    def length(self) -> float:
        return float(self.arc[-1])

    def at(self, s) -> np.ndarray:
        """(..., 3) x, y, heading at arc lengths; straight on before the start and after the end."""
        s = np.asarray(s, dtype=float)
        inside = np.clip(s, 0, self.length)
        x, y, heading = (
            np.interp(inside, self.arc, column) for column in (self.points[:, 0], self.points[:, 1], self.heading)
        )
        return np.stack([x + (s - inside) * np.cos(heading), y + (s - inside) * np.sin(heading), heading], axis=-1)

    def shifted(self, left: float) -> "Path":
        """The same way, `left` metres to the left."""
        normal = np.stack([-np.sin(self.heading), np.cos(self.heading)], axis=1)
        return Path(self.points + left * normal)


def bezier(start, start_heading, end, end_heading, spacing: float = 0.5) -> np.ndarray:
    """(N, 2) a cubic from one directed point to another."""
    start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    reach = 0.42 * np.linalg.norm(end - start)
    a = start + reach * np.array([np.cos(start_heading), np.sin(start_heading)])
    b = end - reach * np.array([np.cos(end_heading), np.sin(end_heading)])
    t = np.linspace(0, 1, max(int(3 * reach / spacing), 4))[:, None]
    return (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * end


class Motion:
    """Positions over time: `at(t)` for seconds from -1 to `duration` + 1."""

    def __init__(self, path: Path, distance: np.ndarray):
        self.path, self.distance = path, distance

    def at(self, t) -> np.ndarray:
        """(..., 3) x, y, heading."""
        times = np.arange(len(self.distance)) * STEP - 1
        return self.path.at(np.interp(t, times, self.distance))

    def speed(self, t: float) -> float:
        index = int(np.clip((t + 1) / STEP, 0, len(self.distance) - 2))
        return float(self.distance[index + 1] - self.distance[index]) / STEP


def drive(path: Path, start: float, cruise: float, duration: float) -> Motion:
    """Drives along a path from arc length `start` at time -1 s, slower in curves, braking and speeding up gently."""
    arc = np.arange(0, path.length + 60, 1.0)
    heading = path.at(arc)[:, 2]
    curvature = np.abs(np.gradient(heading, arc))
    limit = np.minimum(cruise, np.sqrt(1.8 / np.maximum(curvature, 1e-4)))
    for i in range(len(arc) - 2, -1, -1):  # brake at 2 m/s² ahead of a curve
        limit[i] = min(limit[i], np.sqrt(limit[i + 1] ** 2 + 4.0))
    distance, speed = [start], float(np.interp(start, arc, limit))
    for _ in range(int((duration + 2) / STEP)):
        speed = min(speed + 1.5 * STEP, float(np.interp(distance[-1], arc, limit)))
        distance.append(distance[-1] + speed * STEP)
    return Motion(path, np.array(distance))


def stroll(start, end, begin: float, speed: float, duration: float) -> Motion:
    """Walks at a constant speed from a point towards another, starting `begin` metres along; speed 0 stands still."""
    return Motion(Path([start, end]), begin + speed * STEP * np.arange(int((duration + 2) / STEP) + 1))


def still(x: float, y: float, heading: float) -> Motion:
    path = Path([[x, y], [x + np.cos(heading), y + np.sin(heading)]])
    return Motion(path, np.zeros(2))


def boxes_meet(pose, size, others, sizes) -> bool:
    """Whether a box meets any of N others at the same moment.

    Args:
        pose: (T, 3) x, y, heading; others: (N, T, 3).
        size: (width, length) metres; sizes: (N, 2).
    """
    if not len(others):
        return False
    delta = others[..., :2] - pose[:, :2]
    reach = 0.5 * (np.hypot(*size) + np.hypot(sizes[:, 0], sizes[:, 1]))
    near = np.argwhere(np.linalg.norm(delta, axis=-1) < reach[:, None])
    for n, t in near:
        mine, other = pose[t, 2], others[n, t, 2]
        half = 0.5 * np.array([[size[1], size[0]], [sizes[n][1], sizes[n][0]]])
        axes = [np.array([np.cos(a), np.sin(a)]) for a in (mine, mine + np.pi / 2, other, other + np.pi / 2)]
        frames = (axes[:2], axes[2:])
        radius = [sum(h @ np.abs(np.array(frame) @ axis) for h, frame in zip(half, frames)) for axis in axes]
        if all(abs(delta[n, t] @ axis) < r for axis, r in zip(axes, radius)):
            return True
    return False
