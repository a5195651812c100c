"""What every source of driving data gives: drives, their moments, and annotated boxes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...modules.rig import Rig, RigFrame
from .images import load_image

# Signs of the corners (x forward, y left, z up): the front face, then the back face.
_CORNERS = torch.tensor(
    [[x, y, z] for x in (1, -1) for y, z in ((1, 1), (-1, 1), (-1, -1), (1, -1))], dtype=torch.float64
)


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
    """

    instance: str
    category: str
    frame_T_box: torch.Tensor
    size: tuple[float, float, float]
    token: str = ""

    @property
    def center(self) -> torch.Tensor:
        """(3,)"""
        return self.frame_T_box[:3, 3]

    def corners(self) -> torch.Tensor:
        """(8, 3), four in front, then four behind."""
        local = _CORNERS * torch.tensor(self.size, dtype=torch.float64) / 2
        return local @ self.frame_T_box[:3, :3].T + self.center

    def moved(self, other_T_frame: torch.Tensor) -> "Box":
        """The same box in another frame."""
        return replace(self, frame_T_box=other_T_frame @ self.frame_T_box)


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
        images: camera name → where its image should be.
        token: of the sample, empty where there is none.
    """

    scene: str
    timestamp: float
    world_T_ego: torch.Tensor
    rig: Rig
    boxes: tuple[Box, ...] = ()
    images: Mapping[str, Path] = field(default_factory=dict)
    token: str = ""

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
        """(3, height, width) float32 in [0, 1]; FileNotFoundError where there is no file."""
        path = self.image_path(camera)
        if path is None:
            expected = self.images.get(camera, "none was recorded")
            raise FileNotFoundError(f"no image of {camera} at {self.timestamp:.3f} s of {self.scene}: {expected}")
        return load_image(path)


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
