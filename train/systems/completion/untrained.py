"""What can be filled in without any training: on real images, of which there are too few to train on.

Every camera is dropped in turn, at every moment that has one before it. Features are those of a backbone that was
trained elsewhere, with mean 0 and deviation 1 in each channel, so that zeros are the mean. Four fillings:

zeros     the mean
copy      the camera's own last features
own       the same, moved to the present at the depths of V1 and V2
missing   what V3 does with fixed scores: its own and its neighbours' past and its neighbours' present, moved into the
          missing view, on the ground and at several depths; the own past first, and what stays in its cell
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import nn

from ....modules.completion.stage import TemporalConfig
from ....modules.completion.temporal_v3 import MotionCompensatedTemporalCompletionV3
from ....modules.rig import RigFrame
from ....modules.topology import Topology
from ...data.dataset import cover, read_images
from ...data.moments import Drive, Moment
from .baselines import warp_rig

FILLINGS = ("zeros", "copy", "own", "missing")
DEPTHS = (10.0, 30.0, 200.0)  # metres, of `own`
PLANES = (3.5, 6.0, 10.0, 17.0, 35.0, 200.0)  # metres, of `missing`
# Of `missing`: nothing is sharp where no depth is known, for a mean errs less than a wrong place.
KIND_SCORES = (0.0, -3.0, -2.0)  # of the own past, another camera's past and its present
STILL_SCORE, NOTHING_SCORE, STEEPNESS = 1.0, -1.0, 0.03  # of what stays in its cell; of the mean; see V3's


@dataclass
class Filled:
    """How far each filling is from the truth, by camera."""

    stride: int
    errors: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (filling, camera) → relative L2

    def mean(self, filling: str, camera: str | None = None) -> float:
        """The mean relative L2 over the moments, of one camera or all."""
        chosen = [values for (f, c), values in self.errors.items() if f == filling and camera in (None, c)]
        return fmean(value for values in chosen for value in values)

    @property
    def cameras(self) -> list[str]:
        return list(dict.fromkeys(camera for _, camera in self.errors))

    @property
    def samples(self) -> int:
        """How many moments each camera was dropped in."""
        return len(next(iter(self.errors.values()), []))


@torch.no_grad()
def fill(
    drives: Iterable[Drive],
    features: Callable[[torch.Tensor], list[torch.Tensor]],
    strides: Sequence[int],
    image_size: tuple[int, int],
    *,
    max_gap: float = 2.0,
) -> list[Filled]:
    """Compares the fillings at every stride.

    Args:
        drives: scenes of one rig; moments without all images are left out.
        features: turns images (V, 3, H, W) uint8 into a map (V, C, h, w) for each stride.
        strides: image pixels per cell of each map.
        image_size: (height, width) that images are resized and cropped to.
        max_gap: seconds to the moment before, at most.

    Raises:
        ValueError: no moment has all its images and one before it.
    """
    runs = [seen for drive in drives for seen in _runs(drive, features, image_size, max_gap)]
    if not runs:
        raise ValueError("no two consecutive moments have all their images")
    cameras, rig = runs[0][0].moment.rig.names, runs[0][0].moment.rig
    topology = Topology.from_calibration(rig)
    results = []
    for scale, stride in enumerate(strides):
        maps = torch.cat([seen.maps[scale] for run in runs for seen in run])
        mean, deviation = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        stage = _untrained(maps.shape[1], stride, cameras, topology, max_gap)
        result = Filled(stride)
        for run in runs:
            flat = [((seen.maps[scale] - mean) / deviation)[None] for seen in run]
            for index in range(1, len(run)):
                frames = [seen.frame for seen in run[: index + 1]]
                for camera in range(len(cameras)):
                    for filling, filled in _fillings(stage, flat[: index + 1], frames, camera, stride).items():
                        error = (filled - flat[index][0, camera]).norm() / flat[index][0, camera].norm()
                        result.errors.setdefault((filling, cameras[camera]), []).append(error.item())
        results.append(result)
    return results


@dataclass(frozen=True, eq=False)
class _Seen:
    """A moment and its maps."""

    moment: Moment
    frame: RigFrame
    maps: list[torch.Tensor]  # for each stride (V, C, h, w)


def _runs(drive, features, image_size, max_gap):
    """Runs of moments, each soon after the one before, of two or more."""
    runs = [[]]
    for moment in drive:
        if not all(moment.image_path(name) for name in moment.rig.names):
            continue
        if runs[-1] and not 0 < moment.timestamp - runs[-1][-1].timestamp <= max_gap:
            runs.append([])
        runs[-1].append(moment)
    return [[_see(moment, features, image_size) for moment in run] for run in runs if len(run) > 1]


def _see(moment, features, image_size):
    augmentations = {c.name: cover(c.width, c.height, image_size) for c in moment.rig.cameras}
    frame = moment.rig.augmented(augmentations).frame(moment.world_T_ego, moment.timestamp, moment.scene)
    return _Seen(moment, frame, [x.float() for x in features(read_images(moment, augmentations))])


def _untrained(channels, stride, cameras, topology, max_gap):
    """V3 with fixed scores, and a gate that takes all of what is completed."""
    heads = -(-channels // 128)
    while channels % heads:
        heads += 1
    config = TemporalConfig(heads=heads, depths=PLANES, stride=stride, kv_downsample=4, max_gap=max_gap)
    stage = MotionCompensatedTemporalCompletionV3(channels, (stride,), config, cameras=cameras, topology=topology)
    nn.init.constant_(stage.gate[0][-1].bias, 100.0)
    stage.steepness = STEEPNESS
    with torch.no_grad():
        bias = stage.steer[-1].bias  # of the planes, the ground, what stays; the kinds of sources; the mean
        bias[len(PLANES) + 1 :] = torch.tensor([STILL_SCORE, *KIND_SCORES, NOTHING_SCORE])
    return stage.eval()


def _fillings(stage, maps, frames, camera, stride):
    """Filling → the map (C, h, w) of a camera that is missing at the last moment."""
    missing = torch.zeros(maps[-1].shape[:2], dtype=torch.bool)
    missing[0, camera] = True
    history = stage.new_history()
    for past, frame in zip(maps[:-1], frames):
        history.push([past], torch.zeros_like(missing), frame)
    present = torch.where(missing[:, :, None, None, None], 0, maps[-1])
    (completed,), _ = stage.complete([present], missing, frames[-1], history)
    moved = warp_rig(maps[-2], frames[-2], frames[-1], stride, DEPTHS)
    found = dict(zeros=present, copy=maps[-2], own=moved, missing=completed)
    return {name: x[0, camera] for name, x in found.items()}


def tables(results: Sequence[Filled]) -> list[list[list[str]]]:
    """For each stride a table: camera × filling, relative L2, the last row the mean."""
    made = []
    for result in results:
        rows = [[f"stride {result.stride}", *FILLINGS]]
        for camera in (*result.cameras, None):
            rows.append([camera or "mean", *(f"{result.mean(filling, camera):.3f}" for filling in FILLINGS)])
        made.append(rows)
    return made
