"""Moments with what stands on the ground round them, and before each in training those that its past is read from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from ....modules.rig import RigFrame
from ....modules.settings import Count, Positive, Share, Whole
from ....modules.static_bev.history import ABSENT, check_intervals, microseconds
from ....modules.static_bev.losses import StaticTruth
from ....modules.static_bev.network import Observation, StaticBevConfig, StaticInput
from ...data.dataset import DatasetConfig, DriveSamples, read_images
from ...data.images import BadFile, normalised
from ...data.moments import Drive
from ...data.splits import drives_of_splits, need_root
from .truth import GroundTruth, StaticMap, labels_of

_LEAST_MOMENTS = 16  # kept in memory: reading a sample asks for its own, and for those of its past, several times


@dataclass
class StaticDataConfig(DatasetConfig):
    """Settings of the data; see `DatasetConfig` too."""

    image_size: tuple[Count, Count] = (512, 960)  # height, width; multiples of the backbone's strides
    line_width: Positive = 0.4  # metres, of lines as they are drawn; at most two label cells
    p_lost: Share = 0.0  # share of the training samples in which one camera, drawn by moment, is missing now
    sweeps: Count = 1  # LiDAR scans put together
    remember: Whole = 0  # moments that stay in memory with their labels and, as they were drawn (`shift` …), images
    cache: str = ""  # a folder for what the frozen part of the network makes of every moment; empty = none


@dataclass
class StaticBatch:
    """A batch as it travels, of T moments, oldest first: images are bytes until they are on the device."""

    images: torch.Tensor  # (B, T, V, 3, H, W) uint8; empty (B, T, 0) without cameras, and where features are cached
    features: torch.Tensor  # (B, T, C, h, w) bfloat16; empty (B, T, 0) where they are not
    seen: torch.Tensor  # (B, T, 1, h, w) uint8, as `features`
    visible: torch.Tensor  # (B, T, V) bool
    points: list[list[torch.Tensor]]  # T lists of B scans (P, 5); empty without LiDAR
    frames: list[RigFrame]  # T
    truth: StaticTruth  # of the present
    ground: list[GroundTruth]  # of the present, for evaluation; empty in training
    tokens: list[str]
    bad_files: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "StaticWindow":
        """Normalises the images; everything but the poses goes to the device."""
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        observations, features = [], []
        for step, frame in enumerate(self.frames):
            if self.features.ndim > 3:
                features.append((move(self.features[:, step]).float(), move(self.seen[:, step]).float()))
            else:
                points = [move(scan) for scan in self.points[step]] if self.points else None
                images = normalised(move(self.images[:, step])) if self.images.ndim > 3 else None
                observations.append(Observation(images, frame, move(self.visible[:, step]), points))
        truth = self.truth.to(device)
        return StaticWindow(observations, features, self.frames, truth, self.tokens, ground=self.ground)

    def pin_memory(self) -> "StaticBatch":
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "features", "seen")}
        return replace(self, truth=self.truth.pin_memory(), **pinned)


@dataclass
class StaticWindow(StaticInput):
    """What the network takes, and what evaluation compares it with."""

    ground: list[GroundTruth] = field(default_factory=list)


def collate(items: Sequence[StaticBatch]) -> StaticBatch:
    """Joins batches in order."""
    joined = {name: torch.cat([getattr(x, name) for x in items]) for name in ("images", "features", "seen", "visible")}
    lists = {name: [part for x in items for part in getattr(x, name)] for name in ("ground", "tokens", "bad_files")}
    points = [sum(step, []) for step in zip(*(x.points for x in items))]
    frames = [RigFrame.cat(frames) for frames in zip(*(x.frames for x in items))]
    truth = StaticTruth.cat([x.truth for x in items])
    return StaticBatch(points=points, frames=frames, truth=truth, **joined, **lists)


class StaticSamples(DriveSamples):
    """Moments of some drives with their ground; an item is a `StaticBatch` of one.

    In training an item holds, where the network reads a past, the moments that its intervals find. In evaluation it is
    one moment: the network streams, so `share` gives whole scenes to a rank.

    Args:
        drives: scenes.
        config: see `StaticDataConfig`.
        training: augment, bring the past along.
        seed: of the draws.
        model: whose grid, classes and intervals the samples are made for.

    Raises:
        ValueError: a rig does not fit the groups, an interval matches no moment, or a map is broken.
        FileNotFoundError: a map is missing.
    """

    def __init__(
        self, drives: Sequence[Drive], config: StaticDataConfig, training: bool, seed: int, model: StaticBevConfig
    ):
        super().__init__(drives, config, training, seed)
        self.model, self.features = model, None  # features: a `FeatureCache` where what is frozen is cached
        first = self.moment(0)
        model.check_rig(first.rig.names)
        self.names, self.grid = first.rig.names, model.grid.labels()
        self.maps = {name: StaticMap.load(config.root, name, model.head) for name in sorted(self._locations())}
        if model.fusion.reads_history:
            self.times = [[] for _ in self.drives]
            for place, (drive, _) in enumerate(self.places):
                self.times[drive].append(self.moment(place).timestamp)
            check_intervals(model.history, self.times)

    def _remember(self):
        self.moment = lru_cache(maxsize=max(self.config.remember, _LEAST_MOMENTS))(super().moment)
        self.labels = lru_cache(maxsize=self.config.remember)(self._labels)
        self._images = lru_cache(maxsize=self.config.remember)(self._read_images)

    def _locations(self):
        return {drive[0].location for drive in self.drives if len(drive)}

    def share(self, rank: int, ranks: int) -> list[int]:
        """The indices that a rank evaluates: whole scenes, in order."""
        return [index for index, (drive, _) in enumerate(self.places) if drive % ranks == rank]

    def has_files(self, place: int) -> bool:
        if self.model.use_cameras and not super().has_files(place):
            return False
        return not self.model.use_lidar or any(sweep.is_there for sweep in self.moment(place).sweeps(1))

    def past(self, place: int) -> list[int | None]:
        """For each interval, the longest first, the place of the moment that it finds; None where there is none."""
        if not (self.training and self.model.fusion.reads_history):
            return []
        drive, index = self.places[place]
        times, settings, found = self.times[drive], self.model.history, []
        now = microseconds(times[index])
        for interval in reversed(settings.intervals):
            wanted = microseconds(interval)
            off = lambda i: abs(now - microseconds(times[i]) - wanted)  # noqa: B023, E731
            best = min(range(index), key=lambda i: (off(i), -i), default=None)
            near = best is not None and off(best) <= microseconds(settings.tolerance) + 1
            found.append(place - index + best if near else None)
        return found

    def lost_camera(self, place: int) -> int:
        """The camera that is the missing one of a moment, where one is missing at all; the same for every seed."""
        return int(np.random.default_rng((place, 2)).integers(len(self.names)))

    def read(self, place: int, rng: np.random.Generator) -> StaticBatch:
        view = {} if self.features is not None else self.draw_view(rng)
        loses = self.training and rng.random() < self.config.p_lost
        places = [*self.past(place), place]
        now = self.moment(place)
        parts = [self.look(other, view, loses and other == place) for other in places]
        rig = now.rig.augmented(self.augmentations(now.rig, view))
        nothing = replace(rig.frame(now.world_T_ego, now.timestamp, now.scene), scene=(ABSENT,))
        frames = [nothing if frame is None else frame for *_, frame in parts]
        ground, truth = self.labels(place)
        images, features, seen, visible, points = (list(column) for column in zip(*(part[:5] for part in parts)))
        stack = lambda rows: torch.stack(self._filled(rows))[None]  # noqa: E731
        return StaticBatch(
            stack(images), stack(features), stack(seen), stack(visible), [[scan] for scan in self._filled(points)]
            if self.model.use_lidar and self.features is None else [], frames, truth,
            [] if self.training else [ground], [now.token],
        )  # fmt: skip

    def _labels(self, place: int) -> tuple[GroundTruth, StaticTruth]:
        """`labels`: what is true of a moment, as lines and areas and as it is drawn."""
        now = self.moment(place)
        ground = self.maps[now.location].around(now.world_T_ego, self.grid)
        return ground, labels_of(ground, self.grid, self.model.head, self.config.line_width)

    def look(self, place, view, loses):
        """What the sensors, or the cache, have of a moment: (images, features, seen, visible, points, frame), as in
        `StaticBatch` but for the batch; None each where `place` is None. `loses`: `lost_camera` is missing."""
        if place is None:
            return (None,) * 6
        moment, empty = self.moment(place), torch.empty(0)
        augmentations = self.augmentations(moment.rig, view)
        frame = moment.rig.augmented(augmentations).frame(moment.world_T_ego, moment.timestamp, moment.scene)
        visible = torch.ones(len(self.names), dtype=torch.bool)
        if loses:
            visible[self.lost_camera(place)] = False
        if self.features is not None:
            features, seen = self.features.read(moment.token, int(loses))
            return empty, features, seen, visible, empty, frame
        images, points = empty, empty
        if self.model.use_cameras:
            images = self._images(place, tuple(view.items())).masked_fill(~visible[:, None, None, None], 0)
        if self.model.use_lidar:
            try:
                points = moment.points(self.config.sweeps)
            except OSError as error:
                raise BadFile(str(error.filename)) from error
        return images, empty, empty, visible, points, frame

    def _read_images(self, place, view):
        moment = self.moment(place)
        return read_images(moment, self.augmentations(moment.rig, dict(view)))

    @staticmethod
    def _filled(rows):
        """The rows, zeros of the present's shape where there is none."""
        return [torch.zeros_like(rows[-1]) if row is None else row for row in rows]


def build_static(config: StaticDataConfig, model: StaticBevConfig, seed: int) -> tuple[StaticSamples, StaticSamples]:
    """Makes the training set and the validation set, split by scene.

    Raises:
        FileNotFoundError, ValueError, ImportError: no root, most files are absent, see `drives_of_splits` and
            `StaticSamples`.
    """
    need_root(config, "static BEV needs")
    limit = 2 * model.grid.labels().size
    if config.line_width > limit + 1e-9:
        raise ValueError(f"data.line_width is {config.line_width:g}, needs at most {limit:g}, two cells of the labels")
    sets = [
        StaticSamples(drives, config, training, seed, model)
        for drives, training in zip(drives_of_splits(config), (True, False))
    ]
    sets[0].check_files()
    return sets[0], sets[1]
