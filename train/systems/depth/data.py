"""Key frames with the depth that LiDAR points give to the cells of their images, and the objects that boxes do."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ....modules.depth.network import DepthInput
from ....modules.detection.boxes import DETECTION_CLASSES
from ....modules.settings import Count, Positive
from ...command_line import nearest
from ...data.cache import ArrayCache
from ...data.dataset import DatasetConfig, DriveSamples, read_images
from ...data.driving_truth import DrivingTruth, TruthConfig, truth_for_all_ranks
from ...data.images import normalised
from ...data.lidar_depth import SeenPoints, seen_points
from ...data.map_truth import MAP_CLASSES
from ...data.splits import split_names
from .labels import labels_of_points

_CLASSES = (*DETECTION_CLASSES, *MAP_CLASSES)
MAP_SIZE = (60.0, 30.0)  # metres ahead and behind, and to both sides, whose map lines are told


@dataclass
class DepthDataConfig(DatasetConfig):
    """Settings of key frames with depth. See `DatasetConfig` too."""

    image_size: tuple[Count, Count] = (256, 704)  # height, width
    resize: tuple[Positive, Positive] = (1.0, 1.25)
    flip: bool = True
    sweeps: Count = 1  # LiDAR scans put together, the key frame's own included
    cache: str = "work_dirs/cache"  # a folder for the truth of the map, which is made once


@dataclass
class DepthBatch:
    """Key frames as they travel: images are bytes until they are on the device."""

    images: torch.Tensor  # (B, V, 3, H, W) uint8
    depths: list[torch.Tensor]  # for each stride (B, V, h, w) metres, 0 where no point lies
    labels: list[torch.Tensor]  # for each stride (B, V, h, w) int64, see `SeenPoints.labels`; empty without classes
    bad_files: list[str] = field(default_factory=list)  # files that could not be read, whose samples were replaced

    def to(self, device: torch.device | str) -> DepthInput:
        """Normalises the images."""
        images = normalised(self.images.to(device, non_blocking=True))
        depths, labels = (
            [level.to(device, non_blocking=True) for level in part] for part in (self.depths, self.labels)
        )
        return DepthInput(images, depths, labels)

    def pin_memory(self) -> "DepthBatch":
        depths, labels = ([level.pin_memory() for level in part] for part in (self.depths, self.labels))
        return DepthBatch(self.images.pin_memory(), depths, labels, self.bad_files)


def collate(items: Sequence[DepthBatch]) -> DepthBatch:
    """Joins batches in order."""
    images = torch.cat([item.images for item in items])
    joined = lambda part: [torch.cat(level) for level in zip(*(getattr(item, part) for item in items))]  # noqa: E731
    bad_files = [name for item in items for name in item.bad_files]
    return DepthBatch(images, joined("depths"), joined("labels"), bad_files)


class DepthSamples(DriveSamples):
    """Every key frame of some drives; an item is a `DepthBatch` of one.

    Args:
        drives: scenes.
        config: see `DepthDataConfig`.
        training: augment.
        seed: of the draws.
        strides: image pixels per cell of each level, set before it is read.
        classes: names of the objects and map lines that cells are told, set before it is read.
        truth: of every sample, where `classes` has map lines, see `truth_cache`.
    """

    needs = "images or LiDAR scans"
    remedy = "train/tools/make_world.py --out FOLDER makes data that has them"
    strides: tuple[int, ...] = (8, 16, 32, 64)
    classes: tuple[str, ...] = ()
    truth: ArrayCache | None = None

    def has_files(self, place: int) -> bool:
        return super().has_files(place) and all(sweep.path.is_file() for sweep in self.moment(place).sweeps(1))

    def read(self, place: int, rng: np.random.Generator) -> DepthBatch:
        moment, augmentations = self._view(place, self.draw_view(rng))
        points = moment.points(self.config.sweeps)
        seen = self._seen(points, moment, augmentations)
        labels = []
        if self.classes:
            lines = DrivingTruth.from_arrays(self.truth[moment.token]).map if self.truth else None
            told = labels_of_points(points, self.classes, moment.ego_boxes, lines, MAP_SIZE)
            labels = seen.labels(told)
        images = read_images(moment, augmentations)
        return DepthBatch(images[None], [level[None] for level in seen.depths()], [level[None] for level in labels])

    def depths(self, place: int) -> list[torch.Tensor]:
        """The depths of a key frame without augmentation, for each stride (1, V, h, w)."""
        moment, augmentations = self._view(place, {})
        seen = self._seen(moment.points(self.config.sweeps), moment, augmentations)
        return [level[None] for level in seen.depths()]

    def _seen(self, points, moment, augmentations) -> SeenPoints:
        image_T_ego = moment.rig.augmented(augmentations).image_T_ego
        return seen_points(points, image_T_ego, self.config.image_size, self.strides)

    def _view(self, place, view):
        moment = self.moment(place)
        return moment, self.augmentations(moment.rig, view)


def build_depth(
    config: DepthDataConfig, seed: int, strides: tuple[int, ...], classes: tuple[str, ...]
) -> tuple[DepthSamples, DepthSamples]:
    """Makes the training set and the validation set, split by scene, for a network's strides and classes.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `DriveSamples.of_splits`; a class that nothing is called.
    """
    for name in classes:
        if name not in _CLASSES:
            raise ValueError(f"model.classes has {name!r}{nearest(name, _CLASSES)}")
    if not config.root:
        raise ValueError("data.root is empty: depth needs LiDAR scans; train/tools/make_world.py makes some (--data)")
    samples = DepthSamples.of_splits(config, seed)
    for each, split in zip(samples, split_names(config)):
        each.strides, each.classes = strides, classes
        if len(each) and set(classes) & set(MAP_CLASSES):
            each.truth = truth_for_all_ranks(config, split, TruthConfig(MAP_SIZE))
    return samples


def known_means(samples: DepthSamples, places: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums what is known at some places: for each stride the sum of log depths, and their count, (V, h, w) float64."""
    sums, counts = [], []
    for place in places:
        for level, depth in enumerate(samples.depths(place)):
            known = (depth[0] > 0).double()
            logs = torch.where(known > 0, depth[0], 1.0).double().log()
            if level == len(sums):
                sums.append(torch.zeros_like(known))
                counts.append(torch.zeros_like(known))
            sums[level] += logs
            counts[level] += known
    return sums, counts
