"""Plans that need no network, which a learned one has to beat.

Frames: x ahead, y left, metres, of the present; a path is (steps, 2), its first point one period ahead.
"""

import numpy as np

from .planning import EGO_LENGTH, EGO_SHIFT, EGO_WIDTH, rectangles

# Of the intelligent driver model (Treiber, Hennecke, Helbing 2000, arXiv:cond-mat/0002177).
_HEADWAY, _STANDSTILL, _ACCELERATION, _BRAKING = 1.5, 2.0, 1.0, 2.0  # s, m, m/s², m/s²
_SUBSTEPS = 10  # of one step, in which speed and gap change


def baseline_paths(velocity, boxes, frame: str = "lidar", steps: int = 6, period: float = 0.5) -> dict[str, np.ndarray]:
    """Name → path of each; arguments as those of `follow_leader`."""
    return {
        "standing still": standing_still(steps),
        "constant velocity": constant_velocity(velocity, steps, period),
        "follow the leader": follow_leader(velocity, boxes, frame, steps, period),
    }


def standing_still(steps: int = 6) -> np.ndarray:
    """The path of a car that stays."""
    return np.zeros((steps, 2))


def constant_velocity(velocity, steps: int = 6, period: float = 0.5) -> np.ndarray:
    """The path of a car that keeps its velocity (2,), m/s, over the ground. An unknown (NaN) one is 0."""
    velocity = np.nan_to_num(np.asarray(velocity, dtype=np.float64))
    return np.arange(1, steps + 1)[:, None] * period * velocity


def follow_leader(velocity, boxes, frame: str = "lidar", steps: int = 6, period: float = 0.5) -> np.ndarray:
    """The path of a car that keeps its direction, and its speed unless the vehicle ahead makes it slow down.

    The leader is the nearest box whose rear is ahead of the car's middle and that reaches into the strip, as wide as
    the car, which the car is about to drive through. It is taken to keep its speed; the car follows it by the
    intelligent driver model with its present speed as the desired one.

    Args:
        velocity: (2,) of the car, m/s; an unknown (NaN) one is 0.
        boxes: (n, 9): x, y, z, length, width, height, yaw, and velocity in x and y; an unknown (NaN) velocity is 0.
        frame: as for `PlanningMetric`.
        steps, period: of the path.
    """
    velocity = np.nan_to_num(np.asarray(velocity, dtype=np.float64))
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 9)
    speed = wished = np.hypot(*velocity)
    if wished == 0:
        return standing_still(steps)
    ahead = velocity / wished
    gap, leader_speed = _leader(boxes, ahead, EGO_SHIFT[frame])
    along, path, dt = 0.0, [], period / _SUBSTEPS
    for step in range(1, steps * _SUBSTEPS + 1):
        wanted = _STANDSTILL + max(
            0.0, speed * _HEADWAY + speed * (speed - leader_speed) / (2 * np.sqrt(_ACCELERATION * _BRAKING))
        )
        # A leader that is not there is infinitely far, and leaves the speed as it is.
        change = _ACCELERATION * (1 - (speed / wished) ** 4 - (wanted / max(gap, 0.1)) ** 2)
        before, speed = speed, max(0.0, speed + change * dt)
        moved = (before + speed) / 2 * dt
        along, gap = along + moved, gap + leader_speed * dt - moved
        if step % _SUBSTEPS == 0:
            path.append(along * ahead)
    return np.array(path)


def _leader(boxes, ahead, shift):
    """(metres from bumper to bumper, its speed in the car's direction); (inf, 0) without one."""
    side = np.array([-ahead[1], ahead[0]])
    corners = rectangles(boxes[:, :2], boxes[:, 3], boxes[:, 4], boxes[:, 6])  # (n, 4, 2)
    rear, across = (corners @ ahead).min(axis=1) - shift, corners @ side
    in_strip = (across.min(axis=1) < EGO_WIDTH / 2) & (across.max(axis=1) > -EGO_WIDTH / 2)
    leaders = np.flatnonzero(in_strip & (rear > 0))
    if not len(leaders):
        return np.inf, 0.0
    first = leaders[rear[leaders].argmin()]
    return rear[first] - EGO_LENGTH / 2, max(0.0, float(np.nan_to_num(boxes[first, 7:9]) @ ahead))
