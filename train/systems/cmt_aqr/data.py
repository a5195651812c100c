"""Key frames with images, LiDAR and boxes: what the detector is trained and evaluated on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from ....modules.cmt_aqr.head import DETECTION_CLASSES
from ....modules.detection.batch import DetectionInput
from ...data.bev import BevAugmentation
from ...data.images import BadFile, camera_image, normalised
from ...data.moments import Drive, Moment
from ...data.splits import drives_of_splits
from ...data.windows import cover

_ATTEMPTS = 100


@dataclass
class DetectionConfig:
    """Where key frames come from, how many scans they have, and what training does to them.

    Images are augmented as `WindowConfig` says; one draw holds for the cameras of a sample.
    """

    root: str = ""  # a folder in nuScenes format
    version: str | None = None  # of its tables; None = the only one
    train_split: str | None = None  # None = what splits.json or the version says
    val_split: str | None = None
    image_size: tuple[int, int] = (320, 800)  # height, width
    sweeps: int = 10  # LiDAR scans put together, the key frame's own included
    point_range: tuple[float, float, float, float, float, float] = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)  # lows, highs
    resize: tuple[float, float] = (0.94, 1.25)
    flip: bool = False  # mirror the images of half of the samples
    rotation: float = 0.0  # degrees, of the images, drawn from ±rotation
    bev_rotation: float = 0.3925  # radians about z, drawn from ±bev_rotation
    bev_scale: tuple[float, float] = (0.95, 1.05)
    bev_flip: bool = True  # mirror x in half of the samples, and y in half
    cbgs: bool = True  # class-balanced resampling
    p_no_image: float = 0.25  # share of the samples whose images are made black …
    p_no_lidar: float = 0.25  # … and of those, never the same, that lose their points


@dataclass
class DetectionBatch:
    """Key frames as they travel: images are bytes until they are on the device. Fields as in `DetectionInput`."""

    images: torch.Tensor  # (B, V, 3, H, W) uint8
    image_T_ego: torch.Tensor
    points: list[torch.Tensor]
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]
    tokens: list[str]
    bad_files: list[str] = field(default_factory=list)  # files that could not be read, whose samples were replaced

    def to(self, device: torch.device | str) -> DetectionInput:
        """Everything on the device, images normalised. Projections stay on the CPU."""
        images = normalised(self.images.to(device, non_blocking=True))
        parts = ([x.to(device, non_blocking=True) for x in part] for part in (self.points, self.boxes, self.labels))
        return DetectionInput(images, self.image_T_ego, *parts, self.tokens)

    def pin_memory(self) -> "DetectionBatch":
        parts = ([x.pin_memory() for x in part] for part in (self.points, self.boxes, self.labels))
        return DetectionBatch(self.images.pin_memory(), self.image_T_ego, *parts, self.tokens, self.bad_files)


def collate(items: Sequence[DetectionBatch]) -> DetectionBatch:
    images, image_T_ego = (torch.cat([getattr(x, name) for x in items]) for name in ("images", "image_T_ego"))
    lists = ("points", "boxes", "labels", "tokens", "bad_files")
    return DetectionBatch(images, image_T_ego, *([part for x in items for part in getattr(x, name)] for name in lists))


class DetectionSamples(Dataset):
    """Every key frame of some drives; item (epoch, index) is a `DetectionBatch` of one.

    An item depends on (seed, epoch, index) alone. Where a file is missing or broken, another sample takes the place,
    the same one every time, and the item names the file.

    Args:
        drives: scenes.
        config: see `DetectionConfig`.
        training: augment, mask modalities, resample by class, and leave out boxes in which no point lies.
        seed: of the draws.

    Raises:
        ValueError: a setting out of range, no key frame, or, for class balance, none with an object.
    """

    def __init__(self, drives: Sequence[Drive], config: DetectionConfig, training: bool, seed: int = 0):
        _check(config)
        self.drives, self.config, self.training, self.seed = list(drives), config, training, seed
        self._places = [(d, i) for d, drive in enumerate(self.drives) for i in range(len(drive))]
        if not self._places:
            raise ValueError(f"none of {len(self.drives)} scenes has a key frame")
        self._balance, self._drawn = None, (None, None)  # drawn: the last epoch asked for, and its order
        if training and config.cbgs:
            self._balance = ClassBalance([self.targets(self.moment(place))[1] for place in range(len(self._places))])

    def __len__(self) -> int:
        return len(self._places) if self._balance is None else len(self._balance)

    def __getitem__(self, key: tuple[int, int]) -> DetectionBatch:
        epoch, index = key
        bad_files = []
        for place in self._candidates(epoch, index):
            try:
                sample = self._sample(self.moment(place), np.random.default_rng((self.seed, epoch, index)))
            except BadFile as error:
                bad_files += [name for name in error.args if name not in bad_files]
                continue
            sample.bad_files = bad_files
            return sample
        raise FileNotFoundError(f"no whole sample found in {_ATTEMPTS} tries; missing or broken: {bad_files[0]}, …")

    def moment(self, place: int) -> Moment:
        """A key frame, numbered over all drives."""
        drive, index = self._places[place]
        return self.drives[drive][index]

    def targets(self, moment: Moment, bev: BevAugmentation = BevAugmentation()) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (G, 9) float32 and labels (G,) int64 of the objects of the ten classes whose centre is in range, in
        training of those with points; see `DetectionInput`."""
        ego_T_world = torch.linalg.inv(moment.world_T_ego)
        rows, labels = [], []
        for box in moment.boxes:
            label = _label(box.category)
            if label is None or (self.training and box.num_points == 0):
                continue
            box = box.moved(ego_T_world)
            yaw = math.atan2(box.frame_T_box[1, 0], box.frame_T_box[0, 0])
            rows.append([*box.center.tolist(), *box.size, yaw, *box.velocity[:2].tolist()])
            labels.append(label)
        boxes = bev.boxes(torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 9)).float()
        inside = _inside(boxes, self.config.point_range)
        return boxes[inside], torch.tensor(labels, dtype=torch.int64)[inside]

    def _candidates(self, epoch, index) -> Iterator[int]:
        """The sample itself, then its replacements."""
        yield self._order(epoch)[index]
        draw = np.random.default_rng((self.seed, epoch, index, 1))
        for _ in range(min(_ATTEMPTS, 4 * len(self._places)) - 1):
            yield int(draw.integers(len(self._places)))

    def _order(self, epoch):
        if self._balance is None:
            return range(len(self._places))
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._balance.draw(np.random.default_rng((self.seed, epoch, 0, 2)))
        return self._drawn[1]

    def _sample(self, moment, rng):
        view, bev, use_images, use_points = self._draw(rng)
        size = self.config.image_size
        augmentations = {c.name: cover(c.width, c.height, size, **view) for c in moment.rig.cameras}
        images = torch.zeros(len(moment.rig.cameras), 3, *size, dtype=torch.uint8)
        if use_images:
            images = torch.stack([camera_image(moment, name, augmentations[name]) for name in moment.rig.names])
        image_T_ego = moment.rig.augmented(augmentations).image_T_ego @ torch.linalg.inv(bev.matrix)
        points = self._points(moment, bev) if use_points else torch.empty(0, 5)
        boxes, labels = self.targets(moment, bev)
        return DetectionBatch(images[None], image_T_ego[None], [points], [boxes], [labels], [moment.token])

    def _draw(self, rng):
        """How the images are augmented, how space is, whether there are images, and points."""
        if not self.training:
            return {}, BevAugmentation(), True, True
        c = self.config
        view = dict(
            factor=rng.uniform(*c.resize),
            across=rng.uniform(),
            flip=bool(rng.random() < 0.5) and c.flip,
            rotation=rng.uniform(-c.rotation, c.rotation),
        )
        flip_x, flip_y = (bool(flip) and c.bev_flip for flip in rng.random(2) < 0.5)
        bev = BevAugmentation(rng.uniform(-c.bev_rotation, c.bev_rotation), rng.uniform(*c.bev_scale), flip_x, flip_y)
        masked = rng.random()  # one draw, so that never both are gone
        return view, bev, masked >= c.p_no_image, not c.p_no_image <= masked < c.p_no_image + c.p_no_lidar

    def _points(self, moment, bev):
        try:
            points = bev.points(moment.points(self.config.sweeps))
        except OSError as error:
            raise BadFile(str(error.filename)) from error
        return points[_inside(points, self.config.point_range)]


class ClassBalance:
    """Class-balanced resampling (CBGS; Zhu et al. 2019, arXiv:1908.09492): samples are drawn with replacement, equally
    many for each class from those that have it.

    Args:
        labels: of each sample, (G,) int64.
    """

    def __init__(self, labels: Sequence[torch.Tensor]):
        having = {}
        for sample, own in enumerate(labels):
            for label in own.unique().tolist():
                having.setdefault(label, []).append(sample)
        if not having:
            raise ValueError(f"cbgs: none of {len(labels)} samples has an object of the ten classes in range")
        self._having = [np.array(having[label]) for label in sorted(having)]
        self._each = sum(map(len, self._having)) // len(self._having)

    def __len__(self) -> int:
        return self._each * len(self._having)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """One epoch: a sample for each place."""
        return np.concatenate([rng.choice(samples, self._each) for samples in self._having]).tolist()


def build_detection(config: DetectionConfig, seed: int) -> tuple[DetectionSamples, DetectionSamples]:
    """(training, validation), split by scene.

    Raises:
        FileNotFoundError, ValueError, ImportError: no root, a setting out of range, or see `drives_of_splits`.
    """
    if not config.root:
        make = "python train/tools/make_world.py --out FOLDER, then --data FOLDER"
        raise ValueError(f"data.root is empty, detection needs a folder in nuScenes format; make a world: {make}")
    _check(config)
    splits = drives_of_splits(config)
    training, validation = (DetectionSamples(part, config, train, seed) for part, train in zip(splits, (True, False)))
    _check_files_exist(training)
    return training, validation


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


def _check_files_exist(samples: DetectionSamples) -> None:
    """Refuses a folder in which most files are absent, judged by a few key frames, before training begins."""
    count, root = len(samples._places), samples.config.root
    probed = [samples.moment(place) for place in range(0, count, count // 20 + 1)]
    whole = [
        all(moment.image_path(name) for name in moment.rig.names) and moment.sweeps(1)[0].path.is_file()
        for moment in probed
    ]
    if sum(whole) < len(whole) / 2:
        absent = f"{len(whole) - sum(whole)} of {len(whole)} key frames looked at lack images or LiDAR scans"
        raise ValueError(f"{root}: {absent}; train/tools/make_world.py --out FOLDER makes data that has them")


def _label(category: str) -> int | None:
    """Place of a nuScenes category in DETECTION_CLASSES, None where it is in none of the classes."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    name = category_to_detection_name(category)
    return None if name is None else DETECTION_CLASSES.index(name)


def _inside(rows: torch.Tensor, point_range: Sequence[float]) -> torch.Tensor:
    """(N,) bool: which rows (N, 3 + …) begin with a place in the range."""
    low, high = rows.new_tensor(point_range[:3]), rows.new_tensor(point_range[3:])
    return ((rows[:, :3] >= low) & (rows[:, :3] < high)).all(dim=1)
