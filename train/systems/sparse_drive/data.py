"""Windows of moments with all that the driving head learns from, and whole scenes in order for its evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ....modules.rig import RigFrame
from ....modules.settings import Count, Positive, Share, Whole
from ....modules.sparse_drive.losses import DriveTruth
from ....modules.sparse_drive.motion import STATUS
from ....modules.sparse_drive.network import SparseDriveConfig
from ...data.cache import ArrayCache
from ...data.dataset import DatasetConfig, DriveSamples, read_images
from ...data.driving_truth import DrivingTruth, TruthConfig, truth_for_all_ranks
from ...data.futures import EgoFuture, future_boxes
from ...data.images import BadFile, normalised
from ...data.lidar_depth import seen_points
from ...data.map_targets import line_targets
from ...data.moments import Drive, Moment
from ...data.splits import drives_of_splits, need_root, split_names
from ...metrics.motion import MOTION_CLASSES
from .frames import ego_T_lidar, in_frame, truth_in_frame
from .mirror import mirrored, mirrored_points, partners


@dataclass
class DriveConfig(DatasetConfig):
    """Settings of the data; see `DatasetConfig` too."""

    image_size: tuple[Count, Count] = (256, 704)  # height, width
    history: Whole = 1  # moments before the present that training warms the instances up with
    p_no_history: Share = 0.1  # share of the training samples that begin a drive, whatever was before
    # Of all that the head is given and says. "lidar" = the LiDAR's, x right and y ahead, as released weights of
    # SparseDrive know it; figures are the same, but plans are then those of the LiDAR, 0.94 m ahead of the rear axle.
    frame: Literal["ego", "lidar"] = "ego"
    mirror: bool = False  # show half of the training samples as they were in a mirror: left is right, in all they hold
    box_distance: Positive = 55.0  # metres from the ego frame's origin up to which boxes are learned
    depth: bool = True  # whether there is LiDAR that the depth of the maps is learned from
    cache: str = "work_dirs/cache"  # a folder for the truth, which is made once

    def validate(self) -> None:
        super().validate()
        if self.mirror and self.frame != "ego":
            raise ValueError(f"frame is {self.frame!r}, mirror needs 'ego'")


@dataclass
class DriveBatch:
    """Windows of B samples; images are bytes until `to`, and normalised after it."""

    images: torch.Tensor  # (B, T, V, 3, H, W)
    frames: list[RigFrame]  # T of them, oldest first
    status: torch.Tensor  # (B, T, 10) float32, the vehicle's measured status, 0 where unknown
    truth: DriveTruth  # of the present
    depth: list[torch.Tensor]  # for each level (B, V, h, w) metres, 0 = unknown; empty in evaluation
    tokens: list[str]  # of the present samples
    order: list[int]  # a sample's place in its scene
    others: list[list[np.ndarray]]  # boxes (n, 7) of moving things at each step of the plan; empty in training
    velocity: torch.Tensor  # (B, 2) float64 m/s over the ground since the moment before, NaN = unknown
    ego_T_frame: torch.Tensor  # (B, 4, 4) float64, of the frame of `DriveConfig.frame`; all but `others` is in that
    bad_files: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "DriveBatch":
        """Normalises the images; everything but the poses and what metrics take goes to the device."""
        move = lambda value: _each(value, lambda tensor: tensor.to(device, non_blocking=True))  # noqa: E731
        moved = {name: move(getattr(self, name)) for name in ("status", "depth")}
        truth = DriveTruth(**{f.name: move(getattr(self.truth, f.name)) for f in fields(DriveTruth)})
        return replace(self, images=normalised(move(self.images)), truth=truth, **moved)

    def pin_memory(self) -> "DriveBatch":
        return replace(self, images=self.images.pin_memory())


def _each(value, change):
    """A tensor, a list of tensors or None, changed."""
    if isinstance(value, list):
        return [change(tensor) for tensor in value]
    return None if value is None else change(value)


def collate(items: Sequence[DriveBatch]) -> DriveBatch:
    """Joins batches in order."""

    def joined(values):
        first = values[0]
        if first is None:
            return None
        return torch.cat(values) if isinstance(first, torch.Tensor) else [part for value in values for part in value]

    found = {f.name: joined([getattr(x, f.name) for x in items]) for f in fields(DriveBatch) if f.name not in _OWN_WAY}
    truth = DriveTruth(**{f.name: joined([getattr(x.truth, f.name) for x in items]) for f in fields(DriveTruth)})
    frames = [RigFrame.cat(frames) for frames in zip(*(item.frames for item in items))]
    depth = [torch.cat(levels) for levels in zip(*(item.depth for item in items))]
    return DriveBatch(frames=frames, depth=depth, truth=truth, **found)


_OWN_WAY = ("frames", "depth", "truth")


class DrivingSamples(DriveSamples):
    """Moments of some drives with their truth; an item is a `DriveBatch` of one.

    Training takes every window of `history` + 1 moments. Evaluation takes every moment, scene after scene: the head
    streams, so `share` gives whole scenes to a rank.

    Args:
        drives: scenes.
        config: see `DriveConfig`.
        training: augment, have a history.
        seed: of the draws.
        model: whose classes, points of lines, steps and scales the truth is made for.
        truth: of every sample, see `truth_cache`.

    Raises:
        ValueError: no scene is long enough, a rig's cameras are not those of the model, or have no mirror image.
    """

    needs = "images or LiDAR scans"

    def __init__(
        self, drives: Sequence[Drive], config: DriveConfig, training: bool, seed: int, model: SparseDriveConfig,
        truth: ArrayCache,
    ):  # fmt: skip
        super().__init__(drives, config, training, seed, history=config.history if training else 0)
        self.model, self.truth, self._scene = model, truth, (None, [])
        names = self.moment(0).rig.names
        if names != tuple(model.head.cameras):
            needed = ", ".join(model.head.cameras)
            raise ValueError(f"{config.root} has the cameras {', '.join(names)}; model.head.cameras are {needed}")
        if training and config.mirror:
            partners(names)  # or it is refused here

    def share(self, rank: int, ranks: int) -> list[int]:
        """The indices that a rank evaluates: whole scenes, in order."""
        return [index for index, (drive, _) in enumerate(self.places) if drive % ranks == rank]

    def has_files(self, place: int) -> bool:
        if not super().has_files(place):
            return False
        sweeps = self.moment(place).sweeps(1) if self.config.depth else []
        return not self.config.depth or (bool(sweeps) and sweeps[0].path.is_file())

    def read(self, place: int, rng: np.random.Generator) -> DriveBatch:
        moments, view = self.moments(place), self.draw_view(rng)
        begins = self.training and rng.random() < self.config.p_no_history
        mirror = self.training and bool(rng.random() < 0.5) and self.config.mirror
        images, frames, status = [], [], []
        for moment in moments:
            augmentations = self.augmentations(moment.rig, view)
            images.append(read_images(moment, augmentations))
            rig = moment.rig.augmented(augmentations)
            # A moment of another scene is no past.
            scene = f"before {moment.scene}" if begins and moment is not moments[-1] else moment.scene
            frames.append(rig.frame(moment.world_T_ego, moment.timestamp, scene))
            status.append(ego_status(moment, DrivingTruth.from_arrays(self.truth[moment.token]).velocity))
        now, driving = moments[-1], DrivingTruth.from_arrays(self.truth[moments[-1].token])
        drive, index = self.places[place]
        others = [] if self.training else [self._others(drive, index)]
        if self.config.frame == "lidar":
            frames = [in_frame(frame, ego_T_lidar(moment)) for frame, moment in zip(frames, moments)]
        batch = DriveBatch(
            images=torch.stack(images)[None], frames=frames, status=torch.stack(status)[None].nan_to_num(),
            truth=self.targets(now, driving, status[-1]), depth=[], tokens=[now.token], order=[index],
            others=others, velocity=torch.tensor(driving.velocity)[None], ego_T_frame=self._frame(now)[None],
        )  # fmt: skip
        if mirror:
            batch = mirrored(batch, now.rig.names)
        if self.training and self.config.depth:
            batch.depth = self._depth(now, batch, mirror)
        return batch

    def targets(self, moment: Moment, driving: DrivingTruth, status: torch.Tensor) -> DriveTruth:
        """What is true of a moment, as a batch of one: boxes of the model's classes that have points and are near, map
        lines by class with equally many points each, futures as steps."""
        head, rows, labels, places = self.model.head, [], [], []
        for row, box in enumerate(moment.ego_boxes):
            label = _label(box, head.classes)
            if label is None or box.num_points == 0 or box.center[:2].norm() > self.config.box_distance:
                continue
            yaw = math.atan2(box.frame_T_box[1, 0], box.frame_T_box[0, 0])
            rows.append([*box.center.tolist(), *box.size, yaw, *box.velocity[:2].tolist()])
            labels.append(label)
            places.append(row)
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 9)
        known = torch.from_numpy(driving.agent_mask[places].cumprod(axis=1).astype(bool))
        paths = torch.from_numpy(driving.agent_paths[places]).float()
        futures = paths.diff(dim=1, prepend=boxes[:, None, :2]) * known[..., None]
        ego_known = torch.tensor(driving.ego_mask)
        ego_T_frame = self._frame(moment)
        driven = EgoFuture(driving.ego_path, driving.ego_yaw, driving.ego_mask)
        way = torch.tensor(driven.path_of(tuple(ego_T_frame[:2, 3].tolist()))).float()
        way = way.diff(dim=0, prepend=torch.zeros(1, 2)) * ego_known[:, None]
        lines, line_labels = line_targets(driving.map, head.line_classes, head.lines.points)
        truth = DriveTruth(
            [boxes], [torch.tensor(labels, dtype=torch.int64)], [lines], [line_labels], [futures], [known], way[None],
            ego_known[None], torch.tensor([driving.command]), status[None],
        )  # fmt: skip
        return truth if self.config.frame == "ego" else truth_in_frame(truth, ego_T_frame)

    def _frame(self, moment):
        """ego_T_frame (4, 4) of a moment."""
        return ego_T_lidar(moment) if self.config.frame == "lidar" else torch.eye(4, dtype=torch.float64)

    def _depth(self, moment, batch, mirror):
        """Targets of the finest levels, with zeros where the images are padded."""
        levels, strides = self.model.depth.levels, self.model.backbone.strides
        height, width = self.config.image_size
        try:
            points = mirrored_points(moment.points(1)) if mirror else moment.points(1)
        except OSError as error:
            raise BadFile(str(error.filename)) from error
        image_T_ego, found = batch.frames[-1].image_T_ego @ torch.linalg.inv(batch.ego_T_frame)[:, None], []
        seen = seen_points(points, image_T_ego[0], (height, width), strides[:levels])
        for stride, level in zip(strides, seen.depths()):
            rows, columns = (-(-side // strides[-1]) * strides[-1] // stride for side in (height, width))
            found.append(F.pad(level, (0, columns - level.shape[2], 0, rows - level.shape[1]))[None])
        return found

    def _others(self, drive, index):
        if self._scene[0] != drive:
            self._scene = drive, list(self.drives[drive])
        moves = lambda box: box.detection_class in MOTION_CLASSES  # noqa: E731
        return future_boxes(self._scene[1], index, self.model.head.motion.plan_steps, counts=moves)


def ego_status(moment: Moment, velocity: np.ndarray) -> torch.Tensor:
    """The vehicle's status (10,) float32, see `motion.STATUS`: of its sensors where they were recorded, else the
    velocity that follows from the poses; NaN = unknown."""
    status = torch.full((STATUS,), torch.nan)
    state = moment.ego_state()
    if state is not None:
        status[:9] = torch.cat([state.acceleration, state.rotation_rate, state.velocity]).float()
    elif np.isfinite(velocity).all():
        status[6:8] = torch.tensor(velocity)
    return status


def build_driving(config: DriveConfig, model: SparseDriveConfig, seed: int) -> tuple[DrivingSamples, DrivingSamples]:
    """Makes the training set and the validation set, split by scene, with their truth.

    Raises:
        FileNotFoundError, ValueError, ImportError: no root, most files are absent, see `drives_of_splits`,
            `truth_cache` and `DrivingSamples`.
    """
    need_root(config, "driving needs")
    head = model.head
    ahead, aside = head.line_range if config.frame == "ego" else head.line_range[::-1]
    kept = TruthConfig((ahead, aside), head.motion.steps, head.motion.plan_steps)
    sets = []
    for split, drives, training in zip(split_names(config), drives_of_splits(config), (True, False)):
        truth = truth_for_all_ranks(config, split, kept) if drives else {}
        sets.append(DrivingSamples(drives, config, training, seed, model, truth))
    sets[0].check_files()
    return sets[0], sets[1]


def _label(box, classes):
    name = box.detection_class
    return classes.index(name) if name in classes else None
