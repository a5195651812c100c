"""A rig, whom its cameras attend to, and the rig at successive moments: of a nuScenes root or the built-in drives."""

from ..modules.rig import NUSCENES_CAMERAS, Camera, ImageAugmentation, Rig, RigFrame
from ..modules.topology import Topology
from ..train.data import Drive
from .workload import Unavailable

GEOMETRY = "geometry"  # in place of a topology: stage 1 is V3


def rig_of(drives: list[Drive]) -> Rig:
    """The rig of these drives, which all have the same cameras, as it was first."""
    return next(drive[0].rig for drive in drives if len(drive))


def topology_of(name: str, rig: Rig) -> Topology:
    """A topology by its name. Neighbours are nuScenes' where the cameras are, else those whose views overlap.

    "geometry", which is V3's, has the neighbours too.
    """
    name = "neighbours" if name == GEOMETRY else name
    if name == "neighbours" and not set(rig.names) <= set(NUSCENES_CAMERAS):
        return Topology.from_calibration(rig)
    return Topology.named(name, rig.names)


def moments(case, drives: list[Drive]) -> list[RigFrame]:
    """The T moments of history and then the present, in the middle of a drive; samples come from different drives.

    case: has `moments` (T), `batch` and `image` (height, width).
    """
    needed = case.moments + 1
    long_enough = [drive for drive in drives if len(drive) >= needed]
    if not long_enough:
        longest = max((len(drive) for drive in drives), default=0)
        raise Unavailable(f"needs {needed} moments in a row, the longest drive has {longest}")
    chosen = [long_enough[sample % len(long_enough)] for sample in range(case.batch)]
    windows = [_middle(drive, needed) for drive in chosen]
    return [RigFrame.cat([_frame(moment, case) for moment in together]) for together in zip(*windows)]


def _frame(moment, case):
    rig = moment.rig
    rig = rig.augmented({camera.name: _fit(camera, case.image) for camera in rig.cameras})
    return rig.frame(moment.world_T_ego, moment.timestamp, moment.scene)


def _fit(camera: Camera, image: tuple[int, int]) -> ImageAugmentation:
    """Resizes to the width of the case's images and keeps the lower part, where the road is."""
    height, width = image
    resize = ImageAugmentation(width / camera.width)
    top = resize.resized(camera.width, camera.height)[1] - height
    return ImageAugmentation(resize.resize, crop=(0, top, width, height))


def _middle(drive, count):
    start = (len(drive) - count) // 2
    return drive[start : start + count]
