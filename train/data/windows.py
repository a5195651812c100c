"""Windows of consecutive moments: what the completion cascade is trained and evaluated on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from ...modules.completion.cascade import RigWindow
from ...modules.rig import ImageAugmentation, RigFrame
from .drive import builtin_drives
from .images import BadFile, camera_image, normalised
from .moments import Drive, Moment
from .splits import drives_of_splits

_ATTEMPTS = 100


@dataclass
class WindowConfig:
    """Where windows come from and how images are augmented.

    Images are resized so that they cover the output, times a factor from `resize`; a horizontal place of the crop is
    drawn, vertically the bottom stays (the sky goes). Evaluation takes the smallest cover, centred. One draw holds for
    a window.
    """

    root: str = ""  # a folder in nuScenes format; empty = the built-in drive, painted
    version: str | None = None  # of its tables; None = the only one
    train_split: str | None = None  # None = what splits.json or the version says
    val_split: str | None = None
    image_size: tuple[int, int] = (900, 1600)  # height, width
    history: int = 4  # moments before the present
    future: int = 6  # moments of the ego's trajectory
    resize: tuple[float, float] = (1.0, 1.0)
    flip: bool = False  # mirror half of the windows
    rotation: float = 0.0  # degrees, drawn from ±rotation
    scenes: tuple[int, int] = (16, 4)  # of the built-in drive: for training, for validation


@dataclass
class WindowBatch:
    """Windows as they travel: images are bytes until they are on the device."""

    images: torch.Tensor  # (B, T, V, 3, H, W) uint8
    frames: list[RigFrame]  # T of them, oldest first
    trajectory: torch.Tensor  # (B, F, 2) metres, present ego frame
    tokens: list[str]  # of the present samples
    bad_files: list[str] = field(default_factory=list)  # files that could not be read, whose windows were replaced

    def to(self, device: torch.device | str) -> RigWindow:
        """Normalised images and the trajectory on the device. Poses stay on the CPU."""
        images = normalised(self.images.to(device, non_blocking=True))
        return RigWindow(images, self.frames, self.trajectory.to(device, non_blocking=True))

    def pin_memory(self) -> "WindowBatch":
        pinned = self.images.pin_memory(), self.frames, self.trajectory.pin_memory()
        return WindowBatch(*pinned, self.tokens, self.bad_files)


def collate(items: Sequence[WindowBatch]) -> WindowBatch:
    return WindowBatch(
        torch.cat([item.images for item in items]),
        [RigFrame.cat(frames) for frames in zip(*(item.frames for item in items))],
        torch.cat([item.trajectory for item in items]),
        [token for item in items for token in item.tokens],
        [name for item in items for name in item.bad_files],
    )


class Windows(Dataset):
    """Every window of `history` + 1 consecutive moments of some drives; item (epoch, index) is a `WindowBatch` of one.

    An item depends on (seed, epoch, index) alone. Where an image is missing or broken, another window takes the place,
    the same one every time, and the item names the file.

    Args:
        drives: scenes.
        config: see `WindowConfig`.
        augment: draw augmentations.
        seed: of the draws.
    """

    def __init__(self, drives: Sequence[Drive], config: WindowConfig, augment: bool, seed: int = 0):
        self.drives, self.config, self.augment, self.seed = list(drives), config, augment, seed
        self._places = [(d, i) for d, drive in enumerate(self.drives) for i in range(config.history, len(drive))]
        if not self._places:
            raise ValueError(f"none of {len(self.drives)} scenes has the {config.history + 1} moments of a window")
        self._pose = lru_cache(maxsize=4096)(self._read_pose)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: tuple[int, int]) -> WindowBatch:
        epoch, index = key
        bad_files = []
        for place in self._candidates(epoch, index):
            try:
                window = self._window(place, np.random.default_rng((self.seed, epoch, index)))
            except BadFile as error:
                bad_files += [name for name in error.args if name not in bad_files]
                continue
            window.bad_files = bad_files
            return window
        raise FileNotFoundError(f"no whole window found in {_ATTEMPTS} tries; missing or broken: {bad_files[0]}, …")

    def moments(self, place: int) -> list[Moment]:
        """Those of a window, oldest first."""
        drive, present = self._places[place]
        return self.drives[drive][present - self.config.history : present + 1]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_pose"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._pose = lru_cache(maxsize=4096)(self._read_pose)

    def _candidates(self, epoch, index) -> Iterator[int]:
        """The window itself, then its replacements."""
        yield index
        draw = np.random.default_rng((self.seed, epoch, index, 1))
        for _ in range(min(_ATTEMPTS, 4 * len(self)) - 1):
            yield int(draw.integers(len(self)))

    def _window(self, place, rng):
        moments, draw = self.moments(place), self._draw(rng)
        images, frames = [], []
        for moment in moments:
            size = self.config.image_size
            augmentations = {c.name: cover(c.width, c.height, size, **draw) for c in moment.rig.cameras}
            images.append(torch.stack([camera_image(moment, name, augmentations[name]) for name in moment.rig.names]))
            rig = moment.rig.augmented(augmentations)
            frames.append(rig.frame(moment.world_T_ego, moment.timestamp, moment.scene))
        trajectory = self._trajectory(*self._places[place])
        return WindowBatch(torch.stack(images)[None], frames, trajectory[None], [moments[-1].token])

    def _draw(self, rng):
        if not self.augment:
            return {}
        config = self.config
        return dict(
            factor=rng.uniform(*config.resize),
            across=rng.uniform(),
            flip=bool(rng.random() < 0.5) and config.flip,
            rotation=rng.uniform(-config.rotation, config.rotation),
        )

    def _trajectory(self, drive, present):
        """(F, 2) float32. Beyond the scene's end the last known place is repeated."""
        last = len(self.drives[drive]) - 1
        ego_T_world = torch.linalg.inv(self._pose(drive, present))
        future = [self._pose(drive, min(present + step, last)) for step in range(1, self.config.future + 1)]
        return torch.stack([(ego_T_world @ pose)[:2, 3] for pose in future]).float()

    def _read_pose(self, drive, index):
        return self.drives[drive][index].world_T_ego


def cover(
    width: int,
    height: int,
    image_size: tuple[int, int],
    factor: float = 1.0,
    across: float = 0.5,
    flip: bool = False,
    rotation: float = 0.0,
) -> ImageAugmentation:
    """Resizes an image to cover (height, width) `image_size` times `factor`, then crops: the bottom rows, and from left
    to right at `across` in [0, 1]."""
    out_height, out_width = image_size
    resize = factor * max(out_height / height, out_width / width)
    resized_width, resized_height = ImageAugmentation(resize).resized(width, height)
    crop = (round(across * (resized_width - out_width)), resized_height - out_height, out_width, out_height)
    return ImageAugmentation(resize, crop, flip, rotation)


def build_windows(config: WindowConfig, seed: int) -> tuple[Windows, Windows]:
    """(training, validation), split by scene.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `drives_of_splits`.
    """
    if not config.root:
        training, validation = config.scenes
        drives = builtin_drives(training + validation, seed=seed)
        splits = drives[:training], drives[training:]
    else:
        splits = drives_of_splits(config)
    training, validation = (Windows(part, config, augment, seed) for part, augment in zip(splits, (True, False)))
    if config.root:
        _check_images_exist(training, config.root)
    return training, validation


def _check_images_exist(windows: Windows, root: str) -> None:
    """Refuses a folder in which most images are absent, judged by a few windows, before training begins."""
    probed = [windows.moments(place) for place in range(0, len(windows), len(windows) // 20 + 1)]
    whole = [all(moment.image_path(name) for moment in moments for name in moment.rig.names) for moments in probed]
    if sum(whole) < len(whole) / 2:
        absent = f"{len(whole) - sum(whole)} of {len(whole)} windows looked at lack images"
        raise ValueError(f"{root}: {absent}; train/tools/make_world.py --over {root} draws what is missing")
