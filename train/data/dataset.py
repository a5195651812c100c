"""What the data sets of all systems share: settings, replacement of broken samples, augmentation of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ...modules.rig import ImageAugmentation, Rig
from ...modules.settings import Count, NonNegative, Positive
from .images import BadFile, camera_image
from .moments import Drive, Moment
from .splits import drives_of_splits

_ATTEMPTS = 100
_PROBED = 20  # samples whose files are looked for before training begins


@dataclass
class DatasetConfig:
    """Settings of every data set: where samples come from, and what is done to their images.

    Images are resized so that they cover the output, times a factor from `resize`; a horizontal place of the crop is
    drawn, vertically the bottom stays (the sky goes). Evaluation takes the smallest cover, centred. One draw holds for
    all images of a sample.
    """

    root: str = ""  # a folder in nuScenes format
    version: str | None = None  # of its tables; None = the only one
    train_split: str | None = None  # None = what splits.json or the version says
    val_split: str | None = None
    image_size: tuple[Count, Count] = (900, 1600)  # height, width
    resize: tuple[Positive, Positive] = (1.0, 1.0)
    shift: bool = True  # draw the horizontal place of the crop; False = the middle
    flip: bool = False  # mirror the images of half of the samples
    rotation: NonNegative = 0.0  # degrees, of the images, drawn from ±rotation

    def validate(self) -> None:
        if self.resize[0] > self.resize[1]:
            raise ValueError(f"resize is {self.resize}, needs to rise")


class DriveSamples(Dataset):
    """Samples of some drives; item (epoch, index) is a batch of one.

    An item depends on (seed, epoch, index) alone. Where a file is missing or broken, another sample takes the place,
    the same one every time, and the item names the file in its `bad_files`.

    A data set derives from this and defines `read`; where it needs more than images, `has_files`, `needs` and `remedy`;
    where it does not show each sample once an epoch, `order` and `__len__`; where it keeps what it read, `_remember`.

    Args:
        drives: scenes.
        config: see `DatasetConfig`.
        training: augment.
        seed: of the draws.
        history: how many moments before its own a sample needs.

    Raises:
        ValueError: no scene is long enough for a sample.
    """

    needs = "images"  # what a sample cannot be without, in words
    remedy = "train/tools/make_world.py --over {root} draws what is missing"

    def __init__(
        self, drives: Sequence[Drive], config: DatasetConfig, training: bool, seed: int = 0, *, history: int = 0
    ):
        self.drives, self.config, self.training, self.seed = list(drives), config, training, seed
        self.history = history
        self.places = [(d, i) for d, drive in enumerate(self.drives) for i in range(history, len(drive))]
        if not self.places:
            needed = f"{history + 1} moments in a row" if history else "a moment"
            raise ValueError(f"none of {len(self.drives)} scenes has {needed}")
        self._remember()

    def _remember(self):
        """Sets the attributes that keep what was read, each made by `lru_cache`."""

    def __getstate__(self):  # a copy in another process reads for itself
        return {name: value for name, value in vars(self).items() if not hasattr(value, "cache_clear")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._remember()

    @classmethod
    def of_splits(cls, config: DatasetConfig, seed: int) -> tuple["DriveSamples", "DriveSamples"]:
        """Makes the training set and the validation set of `config.root`, split by scene.

        Raises:
            FileNotFoundError, ValueError, ImportError: see `drives_of_splits`; most files are absent.
        """
        splits = zip(drives_of_splits(config), (True, False))
        training, validation = (cls(drives, config, training, seed) for drives, training in splits)
        training.check_files()
        return training, validation

    def read(self, place: int, rng: np.random.Generator):
        """Reads the sample at a place, numbered over all drives, as a batch of one with `bad_files`; BadFile where a
        file is missing or broken."""
        raise NotImplementedError

    def order(self, epoch: int) -> Sequence[int]:
        """The place of each index in an epoch."""
        return range(len(self.places))

    def has_files(self, place: int) -> bool:
        """Says whether every file exists that the sample cannot be without."""
        return all(moment.image_path(name) for moment in self.moments(place) for name in moment.rig.names)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        bad_files = []
        for place in self._candidates(epoch, index):
            try:
                sample = self.read(place, np.random.default_rng((self.seed, epoch, index)))
            except BadFile as error:
                bad_files += [name for name in error.args if name not in bad_files]
                continue
            sample.bad_files = bad_files
            return sample
        raise FileNotFoundError(f"no whole sample found in {_ATTEMPTS} tries; missing or broken: {bad_files[0]}, …")

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The sample itself, then its replacements."""
        yield self.order(epoch)[index]
        draw = np.random.default_rng((self.seed, epoch, index, 1))
        for _ in range(min(_ATTEMPTS, 4 * len(self.places)) - 1):
            yield int(draw.integers(len(self.places)))

    def moment(self, place: int) -> Moment:
        """The moment of a sample."""
        drive, index = self.places[place]
        return self.drives[drive][index]

    def moments(self, place: int) -> list[Moment]:
        """The moment of a sample and the `history` before it, oldest first."""
        drive, index = self.places[place]
        return self.drives[drive][index - self.history : index + 1]

    def check_files(self) -> None:
        """Raises ValueError where most samples lack files, judged by a few of them."""
        probed = range(0, len(self.places), len(self.places) // _PROBED + 1)
        lacking = sum(not self.has_files(place) for place in probed)
        if lacking > len(probed) / 2:
            absent = f"{lacking} of {len(probed)} samples looked at lack {self.needs}"
            raise ValueError(f"{self.config.root}: {absent}; {self.remedy.format(root=self.config.root)}")

    def draw_view(self, rng: np.random.Generator) -> dict:
        """Draws how the images of a sample are augmented: arguments of `cover`, none in evaluation."""
        if not self.training:
            return {}
        config = self.config
        return dict(
            factor=rng.uniform(*config.resize),
            across=rng.uniform() if config.shift else 0.5,
            flip=bool(rng.random() < 0.5) and config.flip,
            rotation=rng.uniform(-config.rotation, config.rotation),
        )

    def augmentations(self, rig: Rig, view: dict) -> dict[str, ImageAugmentation]:
        """The augmentation of each camera's image for what `draw_view` drew."""
        size = self.config.image_size
        return {camera.name: cover(camera.width, camera.height, size, **view) for camera in rig.cameras}


def read_images(moment: Moment, augmentations: dict[str, ImageAugmentation]) -> torch.Tensor:
    """Reads the images of all cameras, augmented: (V, 3, H, W) uint8; BadFile where one is missing or broken."""
    return torch.stack([camera_image(moment, name, augmentations[name]) for name in moment.rig.names])


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
