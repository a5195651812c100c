"""Rotations and rigid transforms in NumPy, float64. Quaternions are (w, x, y, z), as in nuScenes' tables."""

import numpy as np

from ..kernels.runtime.extras import optional

transform = optional("modules", "scipy.spatial.transform")


def rotation_z(yaw: float) -> np.ndarray:
    """(3, 3) rotation by `yaw` radians about the vertical axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_xyz(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """(3, 3) rotation `Rz(yaw) · Ry(pitch) · Rx(roll)`, radians."""
    return transform.Rotation.from_euler("ZYX", [yaw, pitch, roll]).as_matrix()


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
    quaternion = np.roll(transform.Rotation.from_matrix(rotation).as_quat(), 1)  # scipy has w last
    return (quaternion * np.sign(quaternion[np.argmax(np.abs(quaternion))])).tolist()


def to_rotation(quaternion) -> np.ndarray:
    """(3, 3) rotation of a quaternion of any length but 0."""
    return transform.Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()


def from_row(row: dict) -> np.ndarray:
    """(4, 4) transform of a nuScenes row with `rotation` and `translation`."""
    return rigid(to_rotation(row["rotation"]), row["translation"])
