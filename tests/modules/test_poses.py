"""Rotations keep nuScenes' conventions: (w, x, y, z), z up, roll then pitch then yaw."""

import numpy as np
import pytest

from rigfuse.modules.poses import from_row, inverse, rotation_xyz, rotation_z, to_quaternion, to_rotation

HALF = np.sqrt(0.5)


def about(axis, angle):
    """Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@pytest.mark.parametrize("seed", range(5))
def test_angles_quaternions_and_matrices_agree(seed):
    roll, pitch, yaw = np.random.default_rng(seed).uniform(-3, 3, 3)
    expected = about((0, 0, 1), yaw) @ about((0, 1, 0), pitch) @ about((1, 0, 0), roll)
    np.testing.assert_allclose(rotation_xyz(roll, pitch, yaw), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotation_z(yaw), about((0, 0, 1), yaw), rtol=0, atol=1e-12)
    quaternion = to_quaternion(expected)
    assert max(quaternion, key=abs) > 0 and np.linalg.norm(quaternion) == pytest.approx(1, abs=1e-12)
    for factor in (1.0, -1.0, 3.0):
        np.testing.assert_allclose(to_rotation(np.multiply(quaternion, factor)), expected, rtol=0, atol=1e-12)


def test_w_comes_first():
    np.testing.assert_allclose(to_rotation([HALF, 0, 0, HALF]) @ [1, 0, 0], [0, 1, 0], atol=1e-12)  # left is +y
    assert to_quaternion(np.eye(3)) == [1, 0, 0, 0]


def test_a_row_and_its_inverse():
    pose = from_row({"rotation": [HALF, 0, 0, HALF], "translation": [10, 20, 30]})
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [10, 21, 30, 1], atol=1e-12)
    np.testing.assert_allclose(inverse(pose) @ pose, np.eye(4), atol=1e-12)
