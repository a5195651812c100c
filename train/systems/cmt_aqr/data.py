"""Key frames with images, LiDAR and boxes: what the detector is trained and evaluated on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ....modules.detection.batch import DetectionInput
from ....modules.detection.boxes import DETECTION_CLASSES
from ....modules.maps_layout import POINT_RANGE
from ....modules.settings import Count, NonNegative, Positive, Share, Whole
from ...data.bev import BevAugmentation
from ...data.dataset import DatasetConfig, DriveSamples, read_images
from ...data.images import BadFile, normalised
from ...data.moments import Box, Drive, Moment
from ...data.splits import need_root
from .sampling import Frame, put_objects

_UNCHANGED = BevAugmentation()


@dataclass
class DetectionConfig(DatasetConfig):
    """Settings of key frames: how many scans they have, and what training does to them. See `DatasetConfig` too."""

    image_size: tuple[Count, Count] = (320, 800)  # height, width
    frame: Literal["ego", "lidar"] = "ego"  # that points, boxes and projections are in; upstream's weights need lidar
    sweeps: Count = 10  # LiDAR scans put together, the key frame's own included
    point_range: tuple[float, float, float, float, float, float] = POINT_RANGE  # lows, then highs, metres
    resize: tuple[Positive, Positive] = (0.94, 1.25)
    flip: bool = True
    bev_rotation: NonNegative = 0.785  # radians about z, drawn from ±bev_rotation
    bev_scale: tuple[Positive, Positive] = (0.9, 1.1)
    bev_translation: NonNegative = 0.5  # metres, standard deviation along each axis
    bev_flip: bool = True  # mirror x in half of the samples, and y in half
    cbgs: bool = True  # class-balanced resampling
    sampled_epochs: Whole = 15  # the first so many epochs put objects of other frames into each, see `put_objects`
    donors: Count = 2  # of how many frames
    p_no_image: Share = 0.25  # share of the samples whose images are made black …
    p_no_lidar: Share = 0.25  # … and of those, never the same, that lose their points

    def validate(self) -> None:
        super().validate()
        if self.bev_scale[0] > self.bev_scale[1]:
            raise ValueError(f"bev_scale is {self.bev_scale}, needs to rise")
        if not all(low < high for low, high in zip(self.point_range[:3], self.point_range[3:])):
            raise ValueError(f"point_range is {self.point_range}, needs the lows of x, y, z, then higher highs")
        if self.p_no_image + self.p_no_lidar > 1:
            raise ValueError(f"p_no_image + p_no_lidar is {self.p_no_image + self.p_no_lidar:g}, needs at most 1")


@dataclass
class DetectionBatch:
    """Key frames as they travel: images are bytes until they are on the device. Fields as in `DetectionInput`."""

    images: torch.Tensor  # (B, V, 3, H, W) uint8
    image_T_ego: torch.Tensor
    points: list[torch.Tensor]
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]
    tokens: list[str]
    ego_T_frame: torch.Tensor
    bad_files: list[str] = field(default_factory=list)  # files that could not be read, whose samples were replaced

    def to(self, device: torch.device | str) -> DetectionInput:
        """Normalises the images; everything but the projections goes to the device."""
        images = normalised(self.images.to(device, non_blocking=True))
        parts = ([x.to(device, non_blocking=True) for x in part] for part in (self.points, self.boxes, self.labels))
        return DetectionInput(images, self.image_T_ego, *parts, self.tokens, self.ego_T_frame)

    def pin_memory(self) -> "DetectionBatch":
        parts = ([x.pin_memory() for x in part] for part in (self.points, self.boxes, self.labels))
        rest = self.tokens, self.ego_T_frame, self.bad_files
        return DetectionBatch(self.images.pin_memory(), self.image_T_ego, *parts, *rest)


def collate(items: Sequence[DetectionBatch]) -> DetectionBatch:
    """Joins batches in order."""
    joined = {name: torch.cat([getattr(x, name) for x in items]) for name in ("images", "image_T_ego", "ego_T_frame")}
    lists = ("points", "boxes", "labels", "tokens", "bad_files")
    return DetectionBatch(**joined, **{name: [part for x in items for part in getattr(x, name)] for name in lists})


class DetectionSamples(DriveSamples):
    """Every key frame of some drives; an item is a `DetectionBatch` of one.

    Args:
        drives: scenes.
        config: see `DetectionConfig`.
        training: augment, mask modalities, resample by class, and leave out boxes in which no point lies.
        seed: of the draws.

    Raises:
        ValueError: a setting out of range, no key frame, or, for class balance, none with an object.
    """

    needs = "images or LiDAR scans"
    remedy = "train/tools/make_world.py --out FOLDER makes data that has them"

    def __init__(self, drives: Sequence[Drive], config: DetectionConfig, training: bool, seed: int = 0):
        _check(config)
        super().__init__(drives, config, training, seed)
        self._balance, self._last_order = None, (None, None)  # the last epoch asked for, and its order
        self._donors, self._sampling = None, False
        if training and (config.cbgs or config.sampled_epochs):
            balance = ClassBalance([self.targets(self.moment(place))[1] for place in range(len(self.places))])
            self._balance = balance if config.cbgs else None
            self._donors = balance if config.sampled_epochs else None

    def __getitem__(self, key: tuple[int, int]) -> DetectionBatch:
        self._sampling = self._donors is not None and key[0] < self.config.sampled_epochs
        return super().__getitem__(key)

    def __len__(self) -> int:
        return len(self.places) if self._balance is None else len(self._balance)

    def order(self, epoch: int) -> Sequence[int]:
        if self._balance is None:
            return super().order(epoch)
        if self._last_order[0] != epoch:
            self._last_order = epoch, self._balance.draw(np.random.default_rng((self.seed, epoch, 0, 2)))
        return self._last_order[1]

    def has_files(self, place: int) -> bool:
        return super().has_files(place) and self.moment(place).sweeps(1)[0].path.is_file()

    def read(self, place: int, rng: np.random.Generator) -> DetectionBatch:
        moment, (view, bev, use_images, use_points) = self.moment(place), self.draw(rng)
        frame = self._frame(moment, view, use_images, use_points)
        if self._sampling:
            places = [other for other in self._donors.places(self.config.donors, rng) if other != place]
            donors = [self._frame(self.moment(other), view, use_images, use_points, fewest=5) for other in places]
            frame = put_objects(frame, donors, rng)
        points, boxes = bev.points(frame.points), bev.boxes(frame.boxes)
        points = points[_inside(points, self.config.point_range)]
        inside = _inside(boxes, self.config.point_range)
        projection = frame.image_T_frame @ torch.linalg.inv(bev.matrix)
        rest = [points], [boxes[inside]], [frame.labels[inside]], [moment.token], self.ego_T_frame(moment)[None]
        return DetectionBatch(frame.images[None], projection[None], *rest)

    def _frame(self, moment, view, use_images, use_points, fewest=1) -> Frame:
        """A key frame before the augmentation of space, with the boxes in which there are at least `fewest` points."""
        augmentations = self.augmentations(moment.rig, view)
        images = torch.zeros(len(moment.rig.cameras), 3, *self.config.image_size, dtype=torch.uint8)
        if use_images:
            images = read_images(moment, augmentations)
        image_T_frame = moment.rig.augmented(augmentations).image_T_ego @ self.ego_T_frame(moment)
        points = self._points(moment) if use_points else torch.empty(0, 5)
        return Frame(images, image_T_frame, points, *self._objects(moment, fewest))

    def ego_T_frame(self, moment: Moment) -> torch.Tensor:
        """The frame of points, boxes and projections, before any augmentation → the reference ego frame, (4, 4)."""
        if self.config.frame == "ego":
            return torch.eye(4, dtype=torch.float64)
        scans = moment.sweeps(1)
        if not scans:
            raise BadFile(f"LiDAR of {moment.token}")
        return scans[0].ego_T_lidar

    def draw(self, rng: np.random.Generator) -> tuple[dict, BevAugmentation, bool, bool]:
        """Draws how the images are augmented, how space is, whether there are images, and whether there are points."""
        view = self.draw_view(rng)
        if not self.training:
            return view, _UNCHANGED, True, True
        c = self.config
        flip_x, flip_y = (bool(flip) and c.bev_flip for flip in rng.random(2) < 0.5)
        turn, scale = rng.uniform(-c.bev_rotation, c.bev_rotation), rng.uniform(*c.bev_scale)
        masked = rng.random()  # one draw, so that never both are gone
        translation = tuple(c.bev_translation * rng.standard_normal(3))
        bev = BevAugmentation(turn, scale, flip_x, flip_y, translation)
        return view, bev, masked >= c.p_no_image, not c.p_no_image <= masked < c.p_no_image + c.p_no_lidar

    def targets(self, moment: Moment, bev: BevAugmentation = _UNCHANGED) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns boxes (G, 9) float32 and labels (G,) int64 of the objects of the ten classes whose centre is in
        range, in training of those with points; see `DetectionInput`."""
        boxes, labels = self._objects(moment)
        boxes = bev.boxes(boxes)
        inside = _inside(boxes, self.config.point_range)
        return boxes[inside], labels[inside]

    def _objects(self, moment, fewest=1):
        """Boxes and labels of all objects of the ten classes, in training of those with so many points."""
        frame_T_world = torch.linalg.inv(moment.world_T_ego @ self.ego_T_frame(moment))
        rows, labels = [], []
        for box in moment.boxes:
            label = _label(box)
            if label is None or (self.training and box.num_points is not None and box.num_points < fewest):
                continue
            box = box.moved(frame_T_world)
            yaw = math.atan2(box.frame_T_box[1, 0], box.frame_T_box[0, 0])
            rows.append([*box.center.tolist(), *box.size, yaw, *box.velocity[:2].tolist()])
            labels.append(label)
        boxes = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 9).float()
        return boxes, torch.tensor(labels, dtype=torch.int64)

    def _points(self, moment):
        try:
            points = moment.points(self.config.sweeps)
        except OSError as error:
            raise BadFile(str(error.filename)) from error
        frame_T_ego = torch.linalg.inv(self.ego_T_frame(moment)).to(points)
        return torch.cat([points[:, :3] @ frame_T_ego[:3, :3].T + frame_T_ego[:3, 3], points[:, 3:]], dim=1)


class ClassBalance:
    """Class-balanced resampling (CBGS; Zhu et al. 2019, arXiv:1908.09492): samples are drawn with replacement, equally
    many for each class from those that have it.

    Args:
        labels: of each sample, (G,) int64.
    """

    def __init__(self, labels: Sequence[torch.Tensor]):
        having = {}
        for sample, present in enumerate(labels):
            for label in present.unique().tolist():
                having.setdefault(label, []).append(sample)
        if not having:
            raise ValueError(f"cbgs: none of {len(labels)} samples has an object of the ten classes in range")
        self._having = [np.array(having[label]) for label in sorted(having)]
        self._each = sum(map(len, self._having)) // len(self._having)

    def __len__(self) -> int:
        return self._each * len(self._having)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """Draws one epoch: the sample at each index."""
        return np.concatenate([rng.choice(samples, self._each) for samples in self._having]).tolist()

    def places(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draws samples: a class, then one that has it, `count` times."""
        return [int(rng.choice(self._having[int(rng.integers(len(self._having)))])) for _ in range(count)]


def build_detection(config: DetectionConfig, seed: int) -> tuple[DetectionSamples, DetectionSamples]:
    """Makes the training set and the validation set, split by scene.

    Raises:
        FileNotFoundError, ValueError, ImportError: no root, a setting out of range, or see `DriveSamples.of_splits`.
    """
    need_root(config, "detection needs")
    _check(config)  # before the tables are read, which takes a while
    return DetectionSamples.of_splits(config, seed)


def _check(config: DetectionConfig) -> None:
    low, high = config.point_range[:3], config.point_range[3:]
    masked = config.p_no_image, config.p_no_lidar
    needs = {
        "sweeps": (config.sweeps >= 1, "1 or more"),
        "point_range": (all(a < b for a, b in zip(low, high)), "three lows, then three highs above them"),
        "bev_scale": (0 < config.bev_scale[0] <= config.bev_scale[1], "two factors, 0 < first ≤ second"),
        "p_no_image": (min(masked) >= 0 and sum(masked) <= 1, "a share that with p_no_lidar makes 0 to 1"),
    }
    for name, (met, need) in needs.items():
        if not met:
            raise ValueError(f"data.{name} is {getattr(config, name)}, needs {need}")


def _label(box: Box) -> int | None:
    """The place of a box's class in DETECTION_CLASSES, None where it is in none of them."""
    name = box.detection_class
    return None if name is None else DETECTION_CLASSES.index(name)


def _inside(rows: torch.Tensor, point_range: Sequence[float]) -> torch.Tensor:
    """Which rows (N, 3 + …) begin with a place in the range, (N,) bool."""
    low, high = rows.new_tensor(point_range[:3]), rows.new_tensor(point_range[3:])
    return ((rows[:, :3] >= low) & (rows[:, :3] < high)).all(dim=1)
