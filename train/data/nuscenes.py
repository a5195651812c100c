"""Drives from a folder in nuScenes format, opened with nuscenes-devkit.

The rig is what the tables say: any cameras, any number of LiDARs. Cameras of nuScenes' names come in nuScenes' order,
others after them in that of the alphabet.
"""

import copy
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...kernels.runtime.extras import require
from ...modules.poses import from_row, inverse
from ...modules.rig import NUSCENES_CAMERAS, Camera, Rig
from ..command_line import nearest
from .can_bus import PoseMessages
from .moments import Box, Drive, EgoState, Moment, Sweep
from .tables import read_json, read_rows, read_tables

_REFERENCE = "LIDAR_TOP"
_MICROSECOND = 1e-6
_EVALUATION = "evaluation"


def nuscenes_drives(root: str | Path, version: str | None = None, split: str | None = None) -> list[Drive]:
    """The scenes of a nuScenes root, in the order of its scene table.

    Args:
        root: the folder with `samples/` and the tables' folder.
        version: the tables' folder, e.g. "v1.0-mini"; None = the only one there is.
        split: e.g. "mini_val", or a split of `<root>/<version>/splits.json`; None = every scene.

    Raises:
        FileNotFoundError: no such folder, or no tables in it.
        ValueError: several versions to choose from, an unknown split, a scene without cameras, or tables that are
            broken (see `read_tables`) or that the devkit cannot open.
        ImportError: nuscenes-devkit is not installed.
    """
    nusc = open_nuscenes(root, version)
    scenes = nusc.scene
    if split is not None:
        chosen = set(scenes_of_split(Path(root, nusc.version), split))
        scenes = [scene for scene in scenes if scene["name"] in chosen]
        if not scenes:
            raise ValueError(f"{root}: no scene of the split {split!r} is in {nusc.version}")
    return [_Scene(nusc, scene).drive() for scene in scenes]


def open_nuscenes(root: str | Path, version: str | None = None):
    """The devkit's `NuScenes` of a root, its tables judged by `read_tables`.

    Arguments and errors are those of `nuscenes_drives`.
    """
    folder = tables_folder(root, version)
    NuScenes = _devkit().nuscenes.NuScenes
    tables = read_tables(folder)
    nusc = NuScenes.__new__(NuScenes)
    nusc.__load_table__ = lambda name: tables[name] if name in tables else read_rows(folder, name)
    try:
        nusc.__init__(version=folder.name, dataroot=str(folder.parent), verbose=False)
    except Exception as error:  # it raises whatever it meets
        raise ValueError(f"nuscenes-devkit cannot open {folder}: {str(error).partition(chr(10))[0]}") from error
    del nusc.__load_table__
    return nusc


def tables_folder(root: str | Path, version: str | None = None) -> Path:
    """The folder of a nuScenes root that has the tables.

    Raises:
        FileNotFoundError, ValueError: see `nuscenes_drives`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; needs a nuScenes root")
    if version is not None:
        if not (root / version).is_dir():
            raise FileNotFoundError(f"{root} has no version {version!r}: no such folder")
        return root / version
    folders = sorted(path.parent for path in root.glob("*/sample_data.json"))
    if not folders:
        raise FileNotFoundError(f"{root} is not a nuScenes root: no folder in it (like v1.0-mini) has the tables")
    if len(folders) > 1:
        raise ValueError(f"{root} has several versions; choose one of {', '.join(folder.name for folder in folders)}")
    return folders[0]


def own_splits(folder: Path) -> dict[str, list[str]]:
    """Split → names of its scenes, as `splits.json` beside the tables says; empty where there is no such file.

    Raises:
        ValueError: it is anything else than lists of names.
    """
    file = folder / "splits.json"
    splits = read_json(file) if file.exists() else {}
    lists = splits.values() if type(splits) is dict else [None]
    if not all(type(names) is list and all(type(name) is str for name in names) for names in lists):
        raise ValueError(f"{file} needs one object of splits, each a list of names of scenes")
    return splits


def known_splits(folder: Path) -> dict[str, list[str]]:
    """Split → names of its scenes: the devkit's, and before them those of `own_splits`.

    Raises:
        ImportError, ValueError: nuscenes-devkit is not installed; see `own_splits`.
    """
    return _devkit().utils.splits.create_splits_scenes() | own_splits(folder)


def scenes_of_split(folder: Path, split: str) -> list[str]:
    """Names of the scenes of a split; errors as those of `known_splits`, and ValueError for an unknown one."""
    known = known_splits(folder)
    if split not in known:
        raise ValueError(f"{folder}: there is no split {split!r}{nearest(split, known)}")
    return known[split]


def reference_row(nusc, sample: dict) -> dict:
    """The row of sample_data whose ego pose is a sample's: LIDAR_TOP's, else another LiDAR's, else that of the sensor
    nearest in time."""
    rows = (nusc.get("sample_data", token) for token in sample["data"].values())

    def rank(row):
        apart = abs(row["timestamp"] - sample["timestamp"])
        return row["channel"] != _REFERENCE, row["sensor_modality"] != "lidar", apart, row["channel"]

    return min(rows, key=rank)


def evaluation_view(nusc, scenes: Iterable[str], folder: str | Path):
    """A copy of the devkit's `NuScenes` for its evaluations, and the name of the split that has just these scenes.

    By that name an evaluation takes the root's own list where the devkit has another one of the same name, and a rig
    without LIDAR_TOP has the ego pose that `reference_row` says. Rows are shared with `nusc`.

    Args:
        nusc: see `open_nuscenes`.
        scenes: names.
        folder: an empty one, in which the list is written; needed as long as the copy.
    """
    view = copy.copy(nusc)
    view.dataroot, view.version = str(folder), _EVALUATION
    view.sample = [
        row
        if _REFERENCE in row["data"]
        else {**row, "data": {**row["data"], _REFERENCE: reference_row(nusc, row)["token"]}}
        for row in nusc.sample
    ]
    (Path(folder) / _EVALUATION).mkdir()
    (Path(folder) / _EVALUATION / "splits.json").write_text(json.dumps({_EVALUATION: list(scenes)}))
    return view, _EVALUATION


def _devkit():
    require("nuscenes", "nuscenes")
    import nuscenes.nuscenes
    import nuscenes.utils.splits

    return nuscenes


class _Scene:
    """Makes the moments of one scene.

    A sensor that one of its samples lacks is not lacking in the rig: its image or scan counts as a missing file.
    """

    def __init__(self, nusc, scene: dict):
        self.nusc, self.root, self.name = nusc, Path(nusc.dataroot), scene["name"]
        self.location = nusc.get("log", scene["log_token"])["location"]
        self.samples, token = [], scene["first_sample_token"]
        while token:
            self.samples.append(nusc.get("sample", token))
            token = self.samples[-1]["next"]
        rows = [row for sample in self.samples for row in self._key_frame(sample).values()]
        of = {kind: {row["channel"] for row in rows if row["sensor_modality"] == kind} for kind in ("camera", "lidar")}
        self.lidars = tuple(sorted(of["lidar"]))
        self.cameras = [name for name in NUSCENES_CAMERAS if name in of["camera"]]
        self.cameras += sorted(of["camera"].difference(NUSCENES_CAMERAS))
        if not self.cameras:
            raise ValueError(f"{self.root}: scene {self.name} has no camera")
        self._can_bus = self.root / "can_bus" / f"{self.name}_pose.json"
        self._messages = None

    def drive(self) -> Drive:
        return Drive(self.name, len(self.samples), self.moment)

    def moment(self, index: int) -> Moment:
        sample = self.samples[index]
        rows, reference = self._key_frame(sample), reference_row(self.nusc, sample)
        world_T_ego = self._pose(reference)
        return Moment(
            scene=self.name,
            timestamp=sample["timestamp"] * _MICROSECOND,
            world_T_ego=torch.from_numpy(world_T_ego),
            rig=Rig([self._camera(name, rows.get(name), world_T_ego) for name in self.cameras]),
            boxes=tuple(self._box(token) for token in sample["anns"]),
            images={name: self.root / rows[name]["filename"] for name in self.cameras if name in rows},
            token=sample["token"],
            lidars=self.lidars,
            find_sweeps=partial(self._sweeps, rows, reference["timestamp"], world_T_ego) if self.lidars else None,
            annotated=bool(self.nusc.sample_annotation),
            location=self.location,
            find_ego_state=partial(self._ego_state, sample["timestamp"]) if self._can_bus.is_file() else None,
        )

    def _key_frame(self, sample):
        """Channel → row of sample_data."""
        return {channel: self.nusc.get("sample_data", token) for channel, token in sample["data"].items()}

    def _pose(self, row):
        return from_row(self.nusc.get("ego_pose", row["ego_pose_token"]))

    def _camera(self, name, row, world_T_ego):
        then_T_ego = np.eye(4)
        if row is None:  # as any sample has it, and as if exposed at the time of the key frame
            row = self._key_frame(next(sample for sample in self.samples if name in sample["data"]))[name]
        else:
            then_T_ego = inverse(self._pose(row)) @ world_T_ego  # the key frame's ego frame → that of the exposure
        calibration = self.nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
        cam_T_ego = inverse(from_row(calibration)) @ then_T_ego
        return Camera(name, row["width"], row["height"], calibration["camera_intrinsic"], cam_T_ego)

    def _box(self, token):
        row = self.nusc.get("sample_annotation", token)
        width, length, height = row["size"]
        return Box(
            instance=row["instance_token"],
            category=row["category_name"],
            frame_T_box=torch.from_numpy(from_row(row)),
            size=(length, width, height),
            token=token,
            velocity=torch.from_numpy(self.nusc.box_velocity(token)),
            num_points=row["num_lidar_pts"] + row["num_radar_pts"],
            prev=row["prev"],
            next=row["next"],
        )

    def _sweeps(self, rows, time, world_T_ego, number):
        """The scans of the key frame and those before it; a chain that ends early gives fewer."""
        sweeps, ego_T_world = [], inverse(world_T_ego)
        for lidar in self.lidars:
            row = rows.get(lidar)
            for _ in range(number if row else 0):
                calibration = self.nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
                ego_T_lidar = torch.from_numpy(ego_T_world @ self._pose(row) @ from_row(calibration))
                lag = (time - row["timestamp"]) * _MICROSECOND
                sweeps.append(Sweep(self.root / row["filename"], ego_T_lidar, lag, lidar, row is rows[lidar]))
                if not row["prev"]:
                    break
                row = self.nusc.get("sample_data", row["prev"])
        return sorted(sweeps, key=lambda sweep: sweep.lag)

    def _ego_state(self, time) -> EgoState | None:
        if self._messages is None:
            self._messages = PoseMessages(self._can_bus)
        return self._messages.before(time)
