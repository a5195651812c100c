"""Images of one moment and the lines of the map around the car."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ....modules.map_qformer.losses import MapTruth
from ....modules.map_qformer.network import MapQFormerConfig
from ....modules.rig import RigFrame
from ....modules.settings import Count
from ...data.cache import ArrayCache
from ...data.dataset import DatasetConfig, DriveSamples, read_images
from ...data.driving_truth import DrivingTruth, TruthConfig, truth_for_all_ranks
from ...data.images import normalised
from ...data.map_targets import line_targets
from ...data.moments import Drive
from ...data.splits import drives_of_splits, need_root, split_names


@dataclass
class MapDataConfig(DatasetConfig):
    """Settings of the data; see `DatasetConfig` too."""

    image_size: tuple[Count, Count] = (336, 336)  # height, width
    cache: str = "work_dirs/cache"  # a folder for the truth, which is made once


@dataclass
class MapBatch:
    """B samples; images are bytes until `to`, and normalised after it."""

    images: torch.Tensor  # (B, V, 3, H, W)
    frame: RigFrame
    truth: MapTruth
    tokens: list[str]
    bad_files: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "MapBatch":
        """Normalises the images; everything but the poses goes to the device."""
        images = normalised(self.images.to(device, non_blocking=True))
        return replace(self, images=images, truth=self.truth.to(device))

    def pin_memory(self) -> "MapBatch":
        return replace(self, images=self.images.pin_memory())


def collate(items: Sequence[MapBatch]) -> MapBatch:
    """Joins batches in order."""
    joined = lambda part: [value for item in items for value in part(item)]  # noqa: E731
    return MapBatch(
        torch.cat([item.images for item in items]),
        RigFrame.cat([item.frame for item in items]),
        MapTruth(joined(lambda item: item.truth.lines), joined(lambda item: item.truth.labels)),
        joined(lambda item: item.tokens),
        joined(lambda item: item.bad_files),
    )


class MapSamples(DriveSamples):
    """Moments of some drives with the lines around the car; an item is a `MapBatch` of one.

    Args:
        drives: scenes.
        config: see `MapDataConfig`.
        training: augment.
        seed: of the draws.
        model: whose classes, points and cameras the samples are made for.
        truth: of every sample, see `truth_cache`.

    Raises:
        ValueError: no scene, or a rig's cameras are not those of the model.
    """

    def __init__(
        self, drives: Sequence[Drive], config: MapDataConfig, training: bool, seed: int, model: MapQFormerConfig,
        truth: ArrayCache,
    ):  # fmt: skip
        super().__init__(drives, config, training, seed)
        self.model, self.truth = model, truth
        names = self.moment(0).rig.names
        if names != tuple(model.images.cameras):
            needed = ", ".join(model.images.cameras)
            raise ValueError(f"{config.root} has the cameras {', '.join(names)}; model.images.cameras are {needed}")

    def read(self, place: int, rng: np.random.Generator) -> MapBatch:
        moment = self.moment(place)
        augmentations = self.augmentations(moment.rig, self.draw_view(rng))
        images = read_images(moment, augmentations)
        frame = moment.rig.augmented(augmentations).frame(moment.world_T_ego, moment.timestamp, moment.scene)
        return MapBatch(images[None], frame, self.lines(place), [moment.token])

    def share(self, rank: int, ranks: int) -> list[int]:
        """The indices that a rank evaluates: as many on each, since ranks that share a model have to run together; what
        is seen twice counts once."""
        each = -(-len(self) // ranks)
        return [index % len(self) for index in range(rank, each * ranks, ranks)]

    def lines(self, place: int) -> MapTruth:
        """What is true of a sample, as a batch of one."""
        lines = DrivingTruth.from_arrays(self.truth[self.moment(place).token]).map
        found, labels = line_targets(lines, self.model.classes, self.model.points)
        return MapTruth([found], [labels])


def build_maps(config: MapDataConfig, model: MapQFormerConfig, seed: int) -> tuple[MapSamples, MapSamples]:
    """Makes the training set and the validation set, split by scene, with their truth.

    Raises:
        FileNotFoundError, ValueError, ImportError: no root, most files are absent, see `drives_of_splits`,
            `truth_cache` and `MapSamples`.
    """
    need_root(config, "maps need")
    sets = []
    for split, drives, training in zip(split_names(config), drives_of_splits(config), (True, False)):
        truth = truth_for_all_ranks(config, split, TruthConfig(model.line_range)) if drives else {}
        sets.append(MapSamples(drives, config, training, seed, model, truth))
    sets[0].check_files()
    return sets[0], sets[1]
