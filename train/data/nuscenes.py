"""Drives from a folder in nuScenes format, read through nuscenes-devkit."""

from functools import partial
from pathlib import Path, PurePosixPath

import torch

from ...modules.rig import NUSCENES_CAMERAS, Camera, Rig
from .moments import Box, Drive, Moment, Sweep
from .poses import from_row, inverse

REFERENCE = "LIDAR_TOP"  # its ego pose and time are the key frame's
_MICROSECOND = 1e-6


def nuscenes_drives(root: str | Path, version: str | None = None, split: str | None = None) -> list[Drive]:
    """The scenes of a nuScenes root, in the order of its scene table.

    Args:
        root: the folder with `samples/` and the tables' folder.
        version: the tables' folder, e.g. "v1.0-mini"; None = the only one there is.
        split: e.g. "mini_val", or a split of `<root>/<version>/splits.json`; None = every scene.

    Raises:
        FileNotFoundError: no such folder, or no tables in it.
        ValueError: several versions to choose from, an unknown split, tables that the devkit cannot open, or (when a
            moment is asked for) a file name that leaves the root.
        ImportError: nuscenes-devkit is not installed.
    """
    nusc = open_nuscenes(root, version)
    scenes = nusc.scene
    if split is not None:
        chosen = set(_scenes_of_split(nusc, split))
        scenes = [scene for scene in scenes if scene["name"] in chosen]
        if not scenes:
            raise ValueError(f"{root}: no scene of the split {split!r} is in {nusc.version}")
    return [_drive(nusc, scene) for scene in scenes]


def open_nuscenes(root: str | Path, version: str | None = None):
    """The devkit's `NuScenes` of a root; arguments and errors as those of `nuscenes_drives`."""
    root = Path(root)
    return _open(root, version or _only_version(root))


def _only_version(root):
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; needs a nuScenes root")
    versions = sorted(path.parent.name for path in root.glob("*/sample_data.json"))
    if not versions:
        raise FileNotFoundError(f"{root} is not a nuScenes root: no folder in it (like v1.0-mini) has the tables")
    if len(versions) > 1:
        raise ValueError(f"{root} has several versions; choose one of {', '.join(versions)}")
    return versions[0]


def _open(root, version):
    if not (root / version).is_dir():
        raise FileNotFoundError(f"{root} has no version {version!r}: no such folder")
    try:
        from nuscenes import NuScenes
    except ImportError:
        raise ImportError("reading nuScenes needs its devkit: pip install 'rigfuse[nuscenes]'") from None
    try:
        return NuScenes(version=version, dataroot=str(root), verbose=False)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"nuscenes-devkit cannot open {root / version}: {error}") from error


def _scenes_of_split(nusc, split):
    from nuscenes.utils.splits import get_scenes_of_split

    return get_scenes_of_split(split, nusc)


def _drive(nusc, scene):
    tokens, token = [], scene["first_sample_token"]
    while token:
        tokens.append(token)
        token = nusc.get("sample", token)["next"]
    return Drive(scene["name"], len(tokens), partial(_moment, nusc, scene["name"], tokens))


def _moment(nusc, scene, tokens, index):
    sample = nusc.get("sample", tokens[index])
    absent = [channel for channel in (REFERENCE, *NUSCENES_CAMERAS) if channel not in sample["data"]]
    if absent:
        raise ValueError(f"sample {sample['token']} of {scene} has no {', '.join(absent)}")
    rows = {channel: nusc.get("sample_data", token) for channel, token in sample["data"].items()}
    world_T_ego = _pose(nusc, rows[REFERENCE])
    cameras = [_camera(nusc, name, rows[name], world_T_ego) for name in NUSCENES_CAMERAS]
    return Moment(
        scene=scene,
        timestamp=sample["timestamp"] * _MICROSECOND,
        world_T_ego=torch.from_numpy(world_T_ego),
        rig=Rig(cameras),
        boxes=tuple(_box(nusc, token) for token in sample["anns"]),
        images={name: _path_inside(nusc.dataroot, rows[name]["filename"]) for name in NUSCENES_CAMERAS},
        token=sample["token"],
        find_sweeps=partial(_sweeps, nusc, rows[REFERENCE], world_T_ego),
    )


def _pose(nusc, row):
    return from_row(nusc.get("ego_pose", row["ego_pose_token"]))


def _camera(nusc, name, row, world_T_ego):
    calibration = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
    then_T_ego = inverse(_pose(nusc, row)) @ world_T_ego  # the ego frame of the key frame → that of the exposure
    cam_T_ego = inverse(from_row(calibration)) @ then_T_ego
    return Camera(name, row["width"], row["height"], calibration["camera_intrinsic"], cam_T_ego)


def _box(nusc, token):
    row = nusc.get("sample_annotation", token)
    width, length, height = row["size"]
    pose = torch.from_numpy(from_row(row))
    velocity = torch.from_numpy(nusc.box_velocity(token))
    points = row["num_lidar_pts"] + row["num_radar_pts"]
    return Box(row["instance_token"], row["category_name"], pose, (length, width, height), token, velocity, points)


def _sweeps(nusc, row, world_T_ego, number):
    """The scan of `row` and those before it; a chain that ends early gives fewer."""
    sweeps, key_time, ego_T_world = [], row["timestamp"], inverse(world_T_ego)
    while len(sweeps) < number:
        calibration = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
        ego_T_lidar = ego_T_world @ _pose(nusc, row) @ from_row(calibration)
        path, lag = _path_inside(nusc.dataroot, row["filename"]), (key_time - row["timestamp"]) * _MICROSECOND
        sweeps.append(Sweep(path, torch.from_numpy(ego_T_lidar), lag))
        if not row["prev"]:
            break
        row = nusc.get("sample_data", row["prev"])
    return sweeps


def _path_inside(root, filename):
    """Judged by the name alone: a link inside the root may lead where its owner likes."""
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file name {filename!r} leaves the nuScenes root {root}")
    return Path(root, path)
