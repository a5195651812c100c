"""A built-in drive: the geometry of a rig in traffic, made from a seed. No files, no images."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ...modules.rig import Rig, nuscenes_like_rig
from .moments import Box, Drive, Moment

# The cameras fire one after another as the LiDAR sweeps past them: seconds before the key frame's time.
_LEAD = {
    "CAM_FRONT_LEFT": 0.045,
    "CAM_FRONT": 0.035,
    "CAM_FRONT_RIGHT": 0.025,
    "CAM_BACK_RIGHT": 0.020,
    "CAM_BACK": 0.010,
    "CAM_BACK_LEFT": 0.0,
}
_STEP = 0.01  # seconds between the knots of a trajectory
_START = 1.6e9  # seconds; as large as real timestamps are


def builtin_drives(scenes: int = 4, length: int = 40, rate: float = 2.0, seed: int = 0) -> list[Drive]:
    """Seeded drives of `nuscenes_like_rig()` through streets with parked cars; scene n does not depend on `scenes`.

    Args:
        scenes: how many drives.
        length: moments of each.
        rate: moments per second.
        seed: of everything random.
    """
    for name, value in dict(scenes=scenes, length=length, rate=rate).items():
        if not value > 0:
            raise ValueError(f"builtin_drives: {name} is {value}, needs a positive number")
    return [_drive(index, length, rate, np.random.default_rng((seed, index))) for index in range(scenes)]


def _drive(index, length, rate, rng):
    name = f"drive-{index:04d}"
    times = np.arange(length) / rate + rng.normal(0, 0.002, length).clip(-0.005, 0.005)  # as real key frames are
    path = _trajectory((length - 1) / rate + 1, rng)
    boxes = _parked_cars(name, path, rng)
    start = _START + 1000 * index
    return Drive(name, length, partial(_moment, name, start, times, path, boxes, nuscenes_like_rig()))


def _moment(name, start, times, path, boxes, rig, index):
    world_T_ego = _pose(path, times[index])
    cameras = tuple(_exposed(camera, path, times[index], world_T_ego) for camera in rig.cameras)
    near = tuple(box for box in boxes if torch.dist(box.center, world_T_ego[:3, 3]) < 60)
    return Moment(name, float(start + times[index]), world_T_ego, Rig(cameras), near)


def _exposed(camera, path, time, world_T_ego):
    then_T_world = torch.linalg.inv(_pose(path, time - _LEAD[camera.name]))
    return replace(camera, cam_T_ego=camera.cam_T_ego @ then_T_world @ world_T_ego)


def _trajectory(duration, rng):
    """Knots (K, 4) of time, x, y, yaw: speeds of 2 to 14 m/s, bends with less than 2.5 m/s² to the side."""
    time = np.arange(-0.5, duration, _STEP)
    speed = 8 + 3.5 * _wander(time, 0.05, rng)
    yaw_rate = 0.22 * _wander(time, 0.08, rng) * np.minimum(1, 8 / speed)
    heading = rng.uniform(-math.pi, math.pi)
    yaw = heading + np.cumsum(yaw_rate) * _STEP
    x = rng.uniform(-500, 500) + np.cumsum(speed * np.cos(yaw)) * _STEP
    y = rng.uniform(-500, 500) + np.cumsum(speed * np.sin(yaw)) * _STEP
    return np.stack([time, x, y, yaw], axis=1)


def _wander(time, frequency, rng):
    """A smooth random function with values between about −1.7 and 1.7."""
    phases, factors = rng.uniform(0, 2 * math.pi, 3), rng.uniform(0.5, 1.5, 3)
    waves = [np.sin(2 * math.pi * frequency * f * time + p) for f, p in zip(factors, phases)]
    return np.sum(waves, axis=0) / math.sqrt(3)


def _pose(path, time):
    x, y, yaw = (np.interp(time, path[:, 0], path[:, column]) for column in (1, 2, 3))
    return _planar(x, y, 0, yaw)


def _planar(x, y, z, yaw):
    cos, sin = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[cos, -sin, 0, x], [sin, cos, 0, y], [0, 0, 1, z], [0, 0, 0, 1]], dtype=torch.float64)


def _parked_cars(name, path, rng):
    """Cars along both kerbs, about every 15 m, in the world frame."""
    travelled = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path[:, 1:3], axis=0).T))])
    boxes = []
    for place in np.arange(5, travelled[-1], 15):
        time = np.interp(place + rng.uniform(-4, 4), travelled, path[:, 0])
        side, height = rng.choice([-1, 1]), rng.uniform(1.4, 1.8)
        aside = torch.tensor([0, side * rng.uniform(4.5, 6), height / 2, 1], dtype=torch.float64)
        pose = _pose(path, time)
        pose[:, 3] = pose @ aside
        size = (rng.uniform(3.8, 5.0), rng.uniform(1.7, 2.0), float(height))
        boxes.append(Box(f"{name}-car-{len(boxes)}", "vehicle.car", pose, size))
    return tuple(boxes)
