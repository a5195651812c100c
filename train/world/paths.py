"""Curves in the plane, motion along them, and whether two moving boxes meet."""

import numpy as np

STEP = 0.05  # seconds between the stored points of a motion
BEFORE = 1.0  # seconds before time 0 at which a motion begins


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

    def resampled(self, spacing: float) -> "Path":
        """The same way with points `spacing` metres apart, but for rounding at the end."""
        return Path(self.at(np.linspace(0, self.length, max(round(self.length / spacing), 1) + 1))[:, :2])


def bezier(start, start_heading, end, end_heading, spacing: float = 0.5) -> np.ndarray:
    """(N, 2) a cubic from one directed point to another."""
    start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    reach = 0.42 * np.linalg.norm(end - start)
    a = start + reach * np.array([np.cos(start_heading), np.sin(start_heading)])
    b = end - reach * np.array([np.cos(end_heading), np.sin(end_heading)])
    t = np.linspace(0, 1, max(int(3 * reach / spacing), 4))[:, None]
    return (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * end


class Motion:
    """Positions over time.

    Args:
        path: the way.
        distance: arc lengths along it every `STEP` seconds from `-BEFORE` on; it stands still outside these times.
    """

    def __init__(self, path: Path, distance: np.ndarray):
        self.path, self.distance = path, distance
        self.is_still = bool((distance == distance[0]).all())

    def travelled(self, t):
        """Arc length along the path at `t` seconds."""
        return np.interp(t, np.arange(len(self.distance)) * STEP - BEFORE, self.distance)

    def at(self, t) -> np.ndarray:
        """(..., 3) x, y, heading."""
        return self.path.at(self.travelled(t))

    def speed(self, t, span: float = 0.2):
        """Metres a second, averaged over `span` seconds around `t`."""
        return (self.travelled(t + span / 2) - self.travelled(t - span / 2)) / span


def stroll(points, begin: float, speed: float, duration: float) -> Motion:
    """Walks along a polyline at a constant speed, starting `begin` metres along; speed 0 stands still.

    A negative `begin` is a wait at the start, and whoever reaches the end stops there.
    """
    path = Path(points)
    distance = begin + speed * STEP * np.arange(int((duration + 2) / STEP) + 1)
    return Motion(path, distance.clip(0, path.length))


def still(x: float, y: float, heading: float) -> Motion:
    """Stands at a point."""
    path = Path([[x, y], [x + np.cos(heading), y + np.sin(heading)]])
    return Motion(path, np.zeros(2))


def boxes_meet(pose, size, others, sizes) -> np.ndarray:
    """Which of N boxes a box meets at the same moment.

    Args:
        pose: (T, 3) x, y, heading; others: (N, T, 3).
        size: (width, length) metres; sizes: (N, 2).

    Returns:
        (N,) bool.
    """
    met = np.zeros(len(others), dtype=bool)
    if not len(others):
        return met
    delta = others[..., :2] - pose[:, :2]
    reach = 0.5 * (np.hypot(*size) + np.hypot(sizes[:, 0], sizes[:, 1]))
    n, t = np.nonzero(np.linalg.norm(delta, axis=-1) < reach[:, None])
    if not len(n):
        return met
    # Two rectangles are apart where a side of one of them separates them.
    mine, other, delta = pose[t, 2], others[n, t, 2], delta[n, t]
    half = 0.5 * np.stack([np.broadcast_to(size[::-1], (len(n), 2)), sizes[n][:, ::-1]], axis=1)  # along, across
    apart = np.zeros(len(n), dtype=bool)
    for axis in (mine, mine + np.pi / 2, other, other + np.pi / 2):
        gap = np.abs(delta[:, 0] * np.cos(axis) + delta[:, 1] * np.sin(axis))
        for k, heading in enumerate((mine, other)):
            turn = axis - heading
            gap = gap - half[:, k, 0] * np.abs(np.cos(turn)) - half[:, k, 1] * np.abs(np.sin(turn))
        apart |= gap >= 0
    met[n[~apart]] = True
    return met
