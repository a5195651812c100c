"""What every source of driving data gives: drives, their moments, and annotated boxes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ...modules.rig import Rig, RigFrame
from .files import BadFile, read_picture, read_scan

# Signs of the corners (x forward, y left, z up): the front face, then the back face.
_CORNERS = torch.tensor(
    [[x, y, z] for x in (1, -1) for y, z in ((1, 1), (-1, 1), (-1, -1), (1, -1))], dtype=torch.float64
)
_EGO_REACH = 1.0  # metres: points nearer than this in x and in y have hit the ego car


@dataclass(frozen=True, eq=False)
class Box:
    """One annotated object at one moment.

    Args:
        instance: the same for one object over time.
        category: e.g. "vehicle.car".
        frame_T_box: (4, 4) float64. The box frame is centred, x forward, y left, z up; `frame` is the world's in
            `Moment.boxes` and the ego's in `Moment.ego_boxes`.
        size: (length, width, height), metres.
        token: of the annotation, empty where there is none.
        velocity: (3,) float64 m/s over the ground, along the axes of `frame`; NaN = unknown.
        num_points: LiDAR and radar points in it, None = not counted.
        prev, next: tokens of the same object's annotations before and after, empty where there are none.
    """

    instance: str
    category: str
    frame_T_box: torch.Tensor
    size: tuple[float, float, float]
    token: str = ""
    velocity: torch.Tensor = field(default_factory=lambda: torch.full((3,), torch.nan, dtype=torch.float64))
    num_points: int | None = None
    prev: str = ""
    next: str = ""

    @property
    def center(self) -> torch.Tensor:
        """(3,)"""
        return self.frame_T_box[:3, 3]

    def corners(self) -> torch.Tensor:
        """(8, 3), four in front, then four behind."""
        local = _CORNERS * torch.tensor(self.size, dtype=torch.float64) / 2
        return local @ self.frame_T_box[:3, :3].T + self.center

    @property
    def detection_class(self) -> str | None:
        """The class of nuScenes' detection task that its category belongs to; None = none."""
        from nuscenes.eval.detection.utils import category_to_detection_name

        return category_to_detection_name(self.category)

    def holds(self, points: torch.Tensor) -> torch.Tensor:
        """Which points (P, 3 + …) of the box's frame lie in it, (P,) bool."""
        half = torch.tensor(self.size, dtype=torch.float64) / 2
        x, y = self.center[:2].tolist()
        reach = float(half.norm()) + 0.01  # of few points more has to be known
        near = (((points[:, 0] - x).abs() <= reach) & ((points[:, 1] - y).abs() <= reach)).nonzero()[:, 0]
        local = (points[near, :3].double() - self.center) @ self.frame_T_box[:3, :3]
        held = torch.zeros(len(points), dtype=torch.bool)
        held[near] = (local.abs() <= half).all(dim=1)
        return held

    def moved(self, other_T_frame: torch.Tensor) -> "Box":
        """The same box in another frame."""
        velocity = other_T_frame[:3, :3] @ self.velocity
        return replace(self, frame_T_box=other_T_frame @ self.frame_T_box, velocity=velocity)


@dataclass(frozen=True, eq=False)
class EgoState:
    """What the vehicle's own sensors say of its motion, along the axes of the ego frame.

    Args:
        lag: seconds before the moment.
        velocity: (3,) float64, m/s.
        acceleration: (3,) float64, m/s², gravity included.
        rotation_rate: (3,) float64, rad/s.
    """

    lag: float
    velocity: torch.Tensor
    acceleration: torch.Tensor
    rotation_rate: torch.Tensor


class Scan(NamedTuple):
    """LiDAR points.

    points: (P, 5) float32: x, y, z in the reference ego frame (metres), intensity in [0, 1], lag (seconds).
    dropped: how many points were left out because they were not finite.
    """

    points: torch.Tensor
    dropped: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """One turn of a LiDAR, in a file.

    Args:
        path: where its file should be: rows of five float32, x, y, z in the LiDAR frame, intensity (0 … 255), ring.
        ego_T_lidar: (4, 4) float64, the LiDAR frame at the scan's own time to the reference ego frame of the key frame.
        lag: seconds before the key frame's time.
        lidar: the sensor's name.
        key_frame: whether it is the key frame's own, not one before.
    """

    path: Path
    ego_T_lidar: torch.Tensor
    lag: float
    lidar: str = "LIDAR_TOP"
    key_frame: bool = True

    @property
    def is_there(self) -> bool:
        """Whether there is a file with anything in it."""
        return self.path.is_file() and self.path.stat().st_size > 0

    def read(self) -> Scan:
        """The points, without those on the ego car itself and those that are not finite.

        Raises:
            BadFile: see `read_scan`.
        """
        rows, dropped = read_scan(self.path)
        on_ego = (np.abs(rows[:, :2]) < _EGO_REACH).all(axis=1)
        rows = torch.from_numpy(rows[~on_ego])
        rotation, translation = self.ego_T_lidar[:3, :3].float(), self.ego_T_lidar[:3, 3].float()
        xyz = rows[:, :3] @ rotation.T + translation
        points = torch.cat([xyz, rows[:, 3:4] / 255, rows.new_full((len(rows), 1), self.lag)], dim=1)
        return Scan(points, dropped)


@dataclass(frozen=True, eq=False)
class Moment:
    """The rig at one key frame.

    Args:
        scene: name of the drive.
        timestamp: seconds.
        world_T_ego: (4, 4) float64, pose of the reference ego frame at `timestamp`.
        rig: the cameras as seen from the reference ego frame *at their own exposures*: the ego motion between
            `timestamp` and each camera's shot is folded into its `cam_T_ego`.
        boxes: annotations in the world frame.
        images: camera name → where its image should be; a camera that the tables lack at this moment has no entry.
        token: of the sample, empty where there is none.
        lidars: names of the LiDARs of the scene.
        find_sweeps: what `sweeps` calls, None where there is no LiDAR.
        annotated: False where nobody annotated the data, as in a test split: no boxes then says nothing.
        location: of the map, e.g. "boston-seaport", empty where there is none.
        find_ego_state: what `ego_state` calls, None where nothing is recorded.
    """

    scene: str
    timestamp: float
    world_T_ego: torch.Tensor
    rig: Rig
    boxes: tuple[Box, ...] = ()
    images: Mapping[str, Path] = field(default_factory=dict)
    token: str = ""
    lidars: tuple[str, ...] = ()
    find_sweeps: Callable[[int], list[Sweep]] | None = None
    annotated: bool = True
    location: str = ""
    find_ego_state: Callable[[], EgoState | None] | None = None

    @property
    def frame(self) -> RigFrame:
        """A batch of one; `RigFrame.cat` makes larger ones."""
        return self.rig.frame(self.world_T_ego, self.timestamp, self.scene)

    @property
    def ego_boxes(self) -> tuple[Box, ...]:
        ego_T_world = torch.linalg.inv(self.world_T_ego)
        return tuple(box.moved(ego_T_world) for box in self.boxes)

    def image_path(self, camera: str) -> Path | None:
        """The image's file, None where there is no such file."""
        self.rig.index(camera)
        path = self.images.get(camera)
        return path if path is not None and path.is_file() else None

    def image(self, camera: str) -> torch.Tensor:
        """(3, height, width) float32 in [0, 1], of the size that `rig` says, whatever that of the file is.

        Raises:
            FileNotFoundError: there is no file.
            BadFile: it is broken, or has another shape; see `read_picture`.
        """
        path = self.image_path(camera)
        if path is None:
            expected = self.images.get(camera, "none was recorded")
            raise FileNotFoundError(f"no image of {camera} at {self.timestamp:.3f} s of {self.scene}: {expected}")
        size = self.rig[camera].width, self.rig[camera].height
        picture = read_picture(path, size)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    def sweeps(self, number: int) -> list[Sweep]:
        """The key frame's own LiDAR scan and those before it, newest first: at most `number` of each LiDAR."""
        return self.find_sweeps(number) if self.find_sweeps else []

    def scan(self, sweeps: int = 1) -> Scan:
        """The points of up to `sweeps` scans of each LiDAR, newest first.

        Scans before the key frame's own are left out where their file is missing or empty.

        Raises:
            BadFile: a scan of the key frame is missing, or any is broken; see `read_scan`.
        """
        scans = self.sweeps(sweeps)
        for lidar in set(self.lidars) - {sweep.lidar for sweep in scans}:
            raise BadFile(f"{lidar} of {self.token}")
        read = [sweep.read() for sweep in scans if sweep.key_frame or sweep.is_there]
        points = torch.cat([torch.empty(0, 5), *(scan.points for scan in read)])
        return Scan(points, sum(scan.dropped for scan in read))

    def points(self, sweeps: int = 1) -> torch.Tensor:
        """(P, 5) float32, the points of `scan`."""
        return self.scan(sweeps).points

    def ego_state(self) -> EgoState | None:
        """How the vehicle moved, as its own sensors say; None where that was not recorded.

        Raises:
            ValueError: the file that says it is broken.
        """
        return self.find_ego_state() if self.find_ego_state else None


class Drive(Sequence):
    """The moments of one scene in temporal order; each is made when it is asked for.

    Args:
        name: of the scene.
        length: number of moments.
        make: index → Moment.
    """

    def __init__(self, name: str, length: int, make: Callable[[int], Moment]):
        self.name, self._length, self._make = name, length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._length)[index]]
        try:
            index = range(self._length)[index]
        except IndexError:
            raise IndexError(f"{self.name} has {self._length} moments, no index {index}") from None
        return self._make(index)

    def __repr__(self) -> str:
        return f"Drive({self.name!r}, {self._length} moments)"
