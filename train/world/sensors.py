"""The sensors of the generated vehicle, and the files they write."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...modules.poses import from_row, inverse, rigid, rotation_z, to_quaternion
from ...modules.rig import nuscenes_like_rig
from .actors import Actor
from .casting import Pinhole, Scanner, cast
from .scene import REACH, Scene
from .shading import noise, picture

LIDAR = "LIDAR_TOP"
EGO_T_LIDAR = rigid(rotation_z(-np.pi / 2), [0.94, 0.0, 1.84])  # its x points right, its y ahead
ELEVATIONS = np.radians(np.linspace(-30.67, 10.67, 32))
STEPS, LIDAR_REACH = 1080, 100.0
EXPOSURE = {  # seconds after the LiDAR's key frame
    "CAM_FRONT_LEFT": -0.043, "CAM_FRONT": -0.035, "CAM_FRONT_RIGHT": -0.027,
    "CAM_BACK_RIGHT": -0.020, "CAM_BACK": -0.010, "CAM_BACK_LEFT": 0.0,
}  # fmt: skip
DEPTH_UNIT = 1 / 256  # metres; a 16-bit picture reaches 256 m
SHADOWS = 75.0  # metres; shadows farther off are too thin to see


@dataclass(frozen=True)
class Camera:
    name: str
    width: int
    height: int
    intrinsics: np.ndarray  # (3, 3)
    ego_T_cam: np.ndarray  # (4, 4)


def default_cameras(width: int) -> list[Camera]:
    """The six cameras of `nuscenes_like_rig`, scaled to pictures `width` pixels wide."""
    cameras = []
    for camera in nuscenes_like_rig().cameras:
        scale = width / camera.width
        # Pixel centres are at integers, so the corner of the picture at -0.5 is what stays in place.
        to_scaled = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
        intrinsics = to_scaled @ camera.intrinsics.numpy()
        ego_T_cam = inverse(camera.cam_T_ego.numpy())
        cameras.append(Camera(camera.name, width, round(camera.height * scale), intrinsics, ego_T_cam))
    return cameras


def photograph(scene: Scene, camera: Camera, t: float, image: Path, depth: Path):
    """Writes a camera's picture and depth at `t` seconds.

    Returns:
        (visible, alone): for each actor, the pixels it has, and would have with nothing else there.
    """
    world_T_ego = scene.ego_pose(t)
    view = Pinhole(world_T_ego @ camera.ego_T_cam, camera.intrinsics, camera.width, camera.height)
    bodies = scene.bodies(t)
    hits = cast(view, bodies, len(scene.actors))
    near = [item for item in bodies if np.hypot(*(item.position - view.origin)[:2]) < SHADOWS]
    write_image(picture(view, hits, scene.ground, scene.light, near), image)
    write_depth(hits.inverse, depth)
    return hits.visible, hits.alone


def write_image(colours: np.ndarray, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).save(path, quality=92)


def write_depth(inverse_depth: np.ndarray, path: Path):
    """16-bit PNG: depth along the optical axis times 256, 0 for the sky and beyond 255 m."""
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = 1 / np.maximum(inverse_depth, 1e-6)
    depth = np.where(depth < 255, depth / DEPTH_UNIT + 0.5, 0).astype(np.uint16)
    Image.fromarray(depth).save(path, compress_level=1)


def read_depth(path: str | Path) -> np.ndarray:
    """(H, W) float32 metres of a depth picture; 0 where there is no surface within 255 m."""
    with Image.open(path) as image:
        return np.asarray(image).astype(np.float32) * np.float32(DEPTH_UNIT)


def scan(scene: Scene, t: float, path: Path) -> np.ndarray:
    """Writes a LiDAR scan at `t` seconds; returns its points (N, 5) float32: x, y, z, intensity, ring, sensor frame."""
    world_T_lidar = scene.ego_pose(t) @ EGO_T_LIDAR
    view = Scanner(world_T_lidar, ELEVATIONS, STEPS)
    hits = cast(view, scene.bodies(t), len(scene.actors), reach=LIDAR_REACH)
    met = hits.inverse > 0
    ring = np.nonzero(met)[0]
    xyz = view.local[met] / hits.inverse[met][:, None]
    face = hits.face[met]
    world = xyz @ world_T_lidar[:3, :3].T + world_T_lidar[:3, 3]
    paint = scene.ground.coverage(world[:, 0], world[:, 1], np.full(len(world), 0.05))[:, 1]
    bright = hits.looks[:, :6].mean(axis=1) if len(hits.looks) else np.zeros(1)
    intensity = np.where(face >= 0, 15 + 90 * bright[face], 8 + 60 * paint)
    intensity *= 1 + 0.1 * noise(world[:, 0], world[:, 1], 0.1)
    points = np.column_stack([xyz, intensity.clip(0, 255), ring]).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    points.tofile(path)
    return points


def count_points(scene: Scene, t: float, points: np.ndarray) -> np.ndarray:
    """For each actor, the number of a scan's points in its box."""
    world_T_lidar = scene.ego_pose(t) @ EGO_T_LIDAR
    columns = np.ascontiguousarray(points[:, :3].T)
    return np.array([len(points_inside(columns, world_T_lidar, box_of(actor, t))) for actor in scene.actors])


def near(scene: Scene, actor: Actor, t: float) -> bool:
    """Whether an actor is close enough to the ego vehicle to be annotated."""
    return bool(np.hypot(*(actor.motion.at(t) - scene.ego.at(t))[:2]) < REACH)


def box_of(actor: Actor, t: float) -> dict:
    """An actor's box as the annotation table has it: translation, size, rotation."""
    rotation, centre = actor.pose(t)
    return {"translation": centre.round(3).tolist(), "size": list(actor.size), "rotation": to_quaternion(rotation)}


def points_inside(points: np.ndarray, world_T_lidar: np.ndarray, box: dict) -> np.ndarray:
    """Which of the LiDAR's points, given as columns (3, N) float32, are in the box of a row: their numbers."""
    lidar_T_box = inverse(world_T_lidar) @ from_row(box)
    width, length, height = box["size"]
    x, y = lidar_T_box[:2, 3].astype(np.float32)
    reach = np.float32(0.5 * (width + length + height))
    close = np.flatnonzero((np.abs(points[0] - x) < reach) & (np.abs(points[1] - y) < reach))
    offset = points[:, close].astype(np.float64) - lidar_T_box[:3, 3:]
    local = np.abs(lidar_T_box[:3, :3].T @ offset)
    return close[(local <= 0.5 * np.array([[length], [width], [height]])).all(axis=0)]
