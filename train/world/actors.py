"""Whatever is annotated: its category, its size and its motion."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...modules.poses import rotation_z
from .paths import Motion
from .shapes import body_for

RIDER = 1.75  # metres, the height of a bicycle or motorcycle that somebody rides
MOVING = 0.2  # m/s
LIFT = 0.005  # metres from the ground to a box, so that returns from the ground are never in it
# Width, length, height in metres and how common it is, for kinds of each category that differ in size.
MODELS = {
    "vehicle.car": (
        (1.66, 3.65, 1.50, 2), (1.80, 4.30, 1.47, 3), (1.86, 4.80, 1.46, 3), (1.95, 4.75, 1.74, 3),
        (2.02, 5.30, 2.05, 1),
    ),
    "vehicle.truck": ((2.00, 5.60, 1.95, 3), (2.25, 6.60, 2.70, 3), (2.50, 8.60, 3.40, 2), (2.55, 10.80, 3.75, 1)),
    "vehicle.trailer": ((2.10, 6.00, 2.40, 1), (2.45, 9.20, 3.50, 2), (2.55, 12.60, 3.95, 2)),
    "vehicle.bus.rigid": ((2.30, 7.40, 2.90, 1), (2.55, 10.60, 3.20, 3), (2.60, 12.40, 3.90, 2)),
    "vehicle.construction": (
        (1.70, 3.90, 2.45, 1), (2.10, 5.00, 2.60, 1), (2.45, 6.20, 3.00, 2), (2.80, 8.00, 3.30, 1),
    ),
    "vehicle.motorcycle": ((0.68, 1.85, 1.12, 2), (0.82, 2.20, 1.20, 2)),
    "vehicle.bicycle": ((0.52, 1.55, 1.00, 1), (0.62, 1.78, 1.10, 3)),
    "human.pedestrian.adult": ((0.58, 0.62, 1.62, 1), (0.68, 0.74, 1.76, 1), (0.80, 0.86, 1.85, 1)),
    "human.pedestrian.child": ((0.42, 0.44, 1.05, 1), (0.50, 0.52, 1.32, 1)),
    "human.pedestrian.construction_worker": ((0.68, 0.72, 1.72, 1), (0.78, 0.80, 1.84, 1)),
    "movable_object.trafficcone": ((0.30, 0.30, 0.48, 1), (0.38, 0.38, 0.72, 3), (0.46, 0.46, 0.98, 1)),
    "movable_object.barrier": ((1.40, 0.45, 0.95, 1), (2.15, 0.58, 1.05, 3), (3.00, 0.68, 0.88, 1)),
}  # fmt: skip


def draw_size(category: str, rng, ridden: bool = False) -> tuple[float, float, float]:
    """Width, length and height in metres, of a kind drawn by how common it is and a few per cent about it."""
    models = np.array(MODELS[category])
    chosen = models[rng.choice(len(models), p=models[:, 3] / models[:, 3].sum()), :3]
    size = chosen * (1 + 0.04 * rng.normal(0, 1, 3).clip(-2, 2))
    if ridden:
        size[2] = RIDER * (1 + 0.03 * rng.normal(0, 1))
    return tuple(size.round(3).tolist())


@dataclass(frozen=True)
class Actor:
    category: str
    size: tuple[float, float, float]  # width, length, height
    motion: Motion
    seed: int
    parked: bool = False

    @cached_property
    def body(self):
        return body_for(self.category, self.size, self.seed)

    def pose(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Rotation (3, 3) and centre (3,) in the world at `t` seconds."""
        return self._standing if self.motion.is_still else self._pose(t)

    @cached_property
    def _standing(self):
        return self._pose(0.0)

    def _pose(self, t):
        x, y, heading = self.motion.at(t)
        return rotation_z(heading), np.array([x, y, self.size[2] / 2 + LIFT])

    def attribute(self, t: float) -> str | None:
        """nuScenes' attribute at `t` seconds; None for classes that have none."""
        moving = self.motion.speed(t) > MOVING
        kind = self.category.split(".")
        if kind[0] == "human":
            return "pedestrian.moving" if moving else "pedestrian.standing"
        if kind[0] != "vehicle":
            return None
        if kind[1] in ("bicycle", "motorcycle"):
            return "cycle.without_rider" if self.parked else "cycle.with_rider"
        return "vehicle.parked" if self.parked else "vehicle.moving" if moving else "vehicle.stopped"
