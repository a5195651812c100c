"""Figures of planned paths: the distance from the driven one, and how often the car would have hit somebody."""

from collections.abc import Sequence

import numpy as np

from ...kernels.runtime.extras import optional
from .pooling import SampleResults

shapely = optional("train", "shapely")

EGO_LENGTH, EGO_WIDTH = 4.084, 1.85  # metres, of nuScenes' cars
# From a path's point to the middle of the car: the published 0.5 m is for paths of the LiDAR, which stands 0.94 m
# before the origin of nuScenes' ego frame, the middle of the rear axle.
EGO_SHIFT = {"lidar": 0.5, "ego": 0.5 + 0.94}
_STANDING = 0.5  # metres from the first to the last point below which a path has no heading of its own


class PlanningMetric(SampleResults):
    """L2 and collision rate of planned paths under both published protocols, pooled over samples.

    "endpoint" at t is the value of the step at t (UniAD); "mean" at t is the mean over the steps up to t (ST-P3, VAD,
    SparseDrive). Both without @t are the mean over `seconds`. A sample is skipped if a step of its driven path is not
    known. A step at which the driven path itself touches a box is no collision of the plan. Boxes that touch count.

    Args:
        frame: of what point the paths are, "lidar" or "ego" (middle of the rear axle); see `EGO_SHIFT`.
        steps: of a path.
        period: seconds between them; the first step is one period ahead.
        seconds: times that are reported.
    """

    def __init__(self, frame: str = "lidar", steps: int = 6, period: float = 0.5, seconds: Sequence[int] = (1, 2, 3)):
        if frame not in EGO_SHIFT:
            raise ValueError(f"frame is {frame!r}, needs one of {', '.join(EGO_SHIFT)}")
        if not all(1 <= round(second / period) <= steps for second in seconds):
            raise ValueError(f"seconds are {seconds}, need times from {period} to {steps * period}")
        super().__init__(frame=frame, steps=steps, period=period, seconds=tuple(seconds))

    def add(self, token: str, path, true_path, mask, boxes: Sequence) -> None:
        """Adds one sample; arrays or CPU tensors in the frame of the present, x ahead and y left, metres.

        Args:
            token: of the sample.
            path: (steps, 2) planned positions.
            true_path: (steps, 2) driven positions.
            mask: (steps,) bool, which of these are known.
            boxes: for each step the boxes of others at that time, (n, 7 or more): x, y, z, length, width, height, yaw.

        Raises:
            ValueError: shapes that do not fit, a planned position or a known driven one that is not finite.
        """
        steps, shift = self.settings["steps"], EGO_SHIFT[self.settings["frame"]]
        path, true_path = (np.asarray(values, dtype=np.float64) for values in (path, true_path))
        mask = np.asarray(mask, dtype=bool)
        for name, values, shape in (
            ("path", path, (steps, 2)),
            ("true_path", true_path, (steps, 2)),
            ("mask", mask, (steps,)),
        ):
            if values.shape != shape:
                raise ValueError(f"PlanningMetric.add: {name} has shape {values.shape}, needs {shape}")
        if not (np.isfinite(path).all() and np.isfinite(true_path[mask]).all()):
            raise ValueError("PlanningMetric.add: a position is not finite")
        if not mask.all():
            self.samples.setdefault(token, None)
            return
        if len(boxes) != steps:
            raise ValueError(f"PlanningMetric.add: boxes of {len(boxes)} steps, needs {steps}")
        true_hits = collisions(true_path, boxes, shift)
        hits = collisions(path, boxes, shift) & ~true_hits
        self.samples.setdefault(token, np.stack([np.linalg.norm(path - true_path, axis=1), hits, true_hits]))

    def compute(self) -> dict[str, float | None]:
        """L2/PROTOCOL (metres), collision/PROTOCOL and true_collision/PROTOCOL (shares of the samples), each also @Ns;
        samples and skipped. PROTOCOL is endpoint or mean. None where no sample counts."""
        counted = [result for result in self.in_order() if result is not None]
        figures = {"samples": len(counted), "skipped": len(self.samples) - len(counted)}
        steps = np.mean(counted, axis=0) if counted else None  # (3, steps)
        for row, name in enumerate(("L2", "collision", "true_collision")):
            for protocol in ("endpoint", "mean"):
                at = {second: self._at(steps, row, protocol, second) for second in self.settings["seconds"]}
                figures[f"{name}/{protocol}"] = float(np.mean(list(at.values()))) if counted else None
                figures |= {f"{name}/{protocol}@{second:g}s": value for second, value in at.items()}
        return figures

    def _at(self, steps, row, protocol, second):
        if steps is None:
            return None
        number = round(second / self.settings["period"])
        return float(steps[row, number - 1] if protocol == "endpoint" else steps[row, :number].mean())


def collisions(path: np.ndarray, boxes: Sequence, shift: float) -> np.ndarray:
    """Returns (T,) bool: at which steps of a path (T, 2) the ego car touches a box (n, 7 or more) of that step."""
    yaw = headings(path)
    centres = path + shift * np.stack([np.cos(yaw), np.sin(yaw)], axis=1)
    cars = shapely.polygons(rectangles(centres, EGO_LENGTH, EGO_WIDTH, yaw))
    hits = np.zeros(len(path), dtype=bool)
    for step, (car, others) in enumerate(zip(cars, boxes, strict=True)):
        others = np.asarray(others, dtype=np.float64)
        if len(others):
            corners = rectangles(others[:, :2], others[:, 3], others[:, 4], others[:, 6])
            hits[step] = shapely.intersects(car, shapely.polygons(corners)).any()
    return hits


def headings(path: np.ndarray) -> np.ndarray:
    """Returns the (T,) yaw along a path (T, 2) that starts at the origin, which is not one of its points: of the steps
    before and after together, at the end of the step before. A path that stays where it is heads along x."""
    if np.linalg.norm(path[-1] - path[0]) < _STANDING:
        return np.zeros(len(path))
    points = np.concatenate([np.zeros((1, 2)), path])
    along = np.concatenate([points[2:] - points[:-2], points[-1:] - points[-2:-1]])
    return np.arctan2(along[:, 1], along[:, 0])


def rectangles(centres, lengths, widths, yaws) -> np.ndarray:
    """Returns the (n, 4, 2) corners of upright boxes, counter-clockwise from the front left one."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    sizes = np.stack(np.broadcast_arrays(lengths, widths, yaws)[:2], axis=-1)
    corners = signs * sizes[:, None]
    cos, sin = np.cos(yaws)[:, None], np.sin(yaws)[:, None]
    turned = [cos * corners[..., 0] - sin * corners[..., 1], sin * corners[..., 0] + cos * corners[..., 1]]
    return np.stack(turned, axis=-1) + centres[:, None]
