"""Rotations and rigid transforms in NumPy, float64. Quaternions are (w, x, y, z), as in nuScenes' tables."""

import numpy as np


def rotation_z(yaw: float) -> np.ndarray:
    """(3, 3) rotation by `yaw` radians about the vertical axis."""
    return rotation_xyz(0.0, 0.0, yaw)


def rotation_xyz(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """(3, 3) rotation `Rz(yaw) · Ry(pitch) · Rx(roll)`, radians."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def rigid(rotation: np.ndarray, translation) -> np.ndarray:
    """(4, 4) transform from a (3, 3) rotation and a translation in metres."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def inverse(transform: np.ndarray) -> np.ndarray:
    """The inverse of a (4, 4) rigid transform."""
    rotation = transform[:3, :3].T
    return rigid(rotation, -rotation @ transform[:3, 3])


def to_quaternion(rotation: np.ndarray) -> list[float]:
    """Unit quaternion of a (3, 3) rotation, its largest component positive."""
    # Each row of this matrix is the quaternion times one of its own components: the longest row divides best.
    (a, b, c), (d, e, f), (g, h, i) = rotation
    products = np.array(
        [
            [1 + a + e + i, h - f, c - g, d - b],
            [h - f, 1 + a - e - i, b + d, c + g],
            [c - g, b + d, 1 - a + e - i, f + h],
            [d - b, c + g, f + h, 1 - a - e + i],
        ]
    )
    best = products[np.argmax(np.diag(products))]
    return (best / np.linalg.norm(best)).tolist()


def to_rotation(quaternion) -> np.ndarray:
    """(3, 3) rotation of a quaternion."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def from_row(row: dict) -> np.ndarray:
    """(4, 4) transform of a nuScenes row with `rotation` and `translation`."""
    return rigid(to_rotation(row["rotation"]), row["translation"])
