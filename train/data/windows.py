"""Windows of consecutive moments: what networks that look back in time are trained and evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from ...modules.rig import RigFrame
from ...modules.settings import Count, Whole
from ...modules.window import RigWindow
from .dataset import DatasetConfig, DriveSamples, read_images
from .drive import builtin_drives
from .images import normalised
from .moments import Drive


@dataclass
class WindowConfig(DatasetConfig):
    """Settings of windows. An empty root means the built-in drive, painted. See `DatasetConfig` too."""

    history: Whole = 4  # moments before the present
    future: Count = 6  # moments of the ego's trajectory
    scenes: tuple[Count, Count] = (16, 4)  # of the built-in drive: for training, for validation
    remember: Whole = 0  # moments whose images stay in memory: none is read twice where nothing is drawn (`shift` …)


@dataclass
class WindowBatch:
    """Windows as they travel: images are bytes until they are on the device."""

    images: torch.Tensor  # (B, T, V, 3, H, W) uint8
    frames: list[RigFrame]  # T of them, oldest first
    trajectory: torch.Tensor  # (B, F, 2) metres, present ego frame
    tokens: list[str]  # of the present samples
    bad_files: list[str] = field(default_factory=list)  # files that could not be read, whose windows were replaced

    def to(self, device: torch.device | str) -> RigWindow:
        """Normalises the images; these and the trajectory go to the device, poses stay on the CPU."""
        images = normalised(self.images.to(device, non_blocking=True))
        return RigWindow(images, self.frames, self.trajectory.to(device, non_blocking=True))

    def pin_memory(self) -> "WindowBatch":
        pinned = self.images.pin_memory(), self.frames, self.trajectory.pin_memory()
        return WindowBatch(*pinned, self.tokens, self.bad_files)


def collate(items: Sequence[WindowBatch]) -> WindowBatch:
    """Joins batches in order."""
    return WindowBatch(
        torch.cat([item.images for item in items]),
        [RigFrame.cat(frames) for frames in zip(*(item.frames for item in items))],
        torch.cat([item.trajectory for item in items]),
        [token for item in items for token in item.tokens],
        [name for item in items for name in item.bad_files],
    )


class Windows(DriveSamples):
    """Every window of `history` + 1 consecutive moments of some drives; an item is a `WindowBatch` of one.

    Args:
        drives: scenes.
        config: see `WindowConfig`.
        training: augment.
        seed: of the draws.
    """

    def __init__(self, drives: Sequence[Drive], config: WindowConfig, training: bool, seed: int = 0):
        super().__init__(drives, config, training, seed, history=config.history)

    def _remember(self):
        self._pose = lru_cache(maxsize=4096)(self._read_pose)
        self._images = lru_cache(maxsize=self.config.remember)(self._read_images)

    def read(self, place: int, rng: np.random.Generator) -> WindowBatch:
        moments, view = self.moments(place), self.draw_view(rng)
        images, frames = [], []
        drive, present = self.places[place]
        for index, moment in zip(range(present - self.history, present + 1), moments):
            augmentations = self.augmentations(moment.rig, view)
            images.append(self._images(drive, index, tuple(view.items())))
            rig = moment.rig.augmented(augmentations)
            frames.append(rig.frame(moment.world_T_ego, moment.timestamp, moment.scene))
        trajectory = self._trajectory(*self.places[place])
        return WindowBatch(torch.stack(images)[None], frames, trajectory[None], [moments[-1].token])

    def _trajectory(self, drive, present):
        """The ego's next places in the present ego frame, (F, 2) float32 metres. Beyond the scene's end the last known
        place is repeated."""
        last = len(self.drives[drive]) - 1
        ego_T_world = torch.linalg.inv(self._pose(drive, present))
        future = [self._pose(drive, min(present + step, last)) for step in range(1, self.config.future + 1)]
        return torch.stack([(ego_T_world @ pose)[:2, 3] for pose in future]).float()

    def _read_images(self, drive, index, view):
        moment = self.drives[drive][index]
        return read_images(moment, self.augmentations(moment.rig, dict(view)))

    def _read_pose(self, drive, index):
        return self.drives[drive][index].world_T_ego


def build_windows(config: WindowConfig, seed: int) -> tuple[Windows, Windows]:
    """Makes the training set and the validation set, split by scene.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `DriveSamples.of_splits`.
    """
    if config.root:
        return Windows.of_splits(config, seed)
    training, validation = config.scenes
    drives = builtin_drives(training + validation, seed=seed)
    return Windows(drives[:training], config, True, seed), Windows(drives[training:], config, False, seed)
