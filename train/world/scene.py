"""A drive through a town: the town, the light, the ego vehicle's motion and everything annotated along its way."""

from functools import cached_property

import numpy as np

from ...modules.poses import rigid, rotation_xyz
from .actors import Actor
from .casting import Placed
from .ground import Ground
from .markings import mark, paint_of
from .paths import Motion
from .populate import populate
from .scenery import furnish, signal_posts
from .shading import Light
from .town import build_town

REACH = 80.0  # metres; objects farther than this from the ego vehicle are not annotated
SIGHT = 190.0  # metres within which scenery is drawn


def is_validation(index: int) -> bool:
    """Every fifth scene from the second on, whatever their number."""
    return index % 5 == 1


def place_of(index: int) -> tuple[int, int]:
    """(map, tile on it) of a scene's town; map 1 has the towns of validation, the others those of training."""
    if is_validation(index):
        return 1, index // 5
    earlier = index - (index + 3) // 5  # training scenes before it
    return (0, 2, 3)[earlier % 3], earlier // 3


class Scene:
    """Scene `index` of the world of `seed`; the same whatever other scenes are made, and in a town of its own.

    Args:
        seed, index: what follows is a function of these and of the other arguments alone.
        samples: number of key frames.
        period: seconds between them.
        style: what kind of town; a key of `STYLES`.
    """

    def __init__(self, seed: int, index: int, samples: int, period: float = 0.5, style: str = "streets"):
        self.index, self.samples, self.period, self.style = index, samples, period, style
        self.place, slot = place_of(index)
        self.town_name = f"{style}-{seed}-{index:04d}"
        self.town = build_town(seed, index, style, slot)
        rng = np.random.default_rng([seed, 303, index])
        self.markings = mark(self.town, rng)
        self.scenery = furnish(self.town, self.markings, rng)
        self.signals = signal_posts(self.town)
        rng = np.random.default_rng([seed, 202, index])
        self.duration = samples * period
        azimuth, rise = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(35, 60))
        sun = np.array([np.cos(rise) * np.cos(azimuth), np.cos(rise) * np.sin(azimuth), np.sin(rise)])
        self.light = Light(sun=tuple(sun), clouds=rng.uniform(0.3, 0.8))
        self._load = rng.normal(0, [0.006, 0.004])  # pitch and roll of the vehicle as it is laden, radians
        self._phase = rng.uniform(0, 6.3, 3)
        times = np.arange(samples) * period
        people = populate(self.town, self.markings, self.scenery, times, self.duration, rng)
        self.ego: Motion = people.ego
        self.actors: list[Actor] = people.actors

    def __getstate__(self):
        """Without the ground, which is large and drawn again in no time."""
        return {name: value for name, value in vars(self).items() if name != "ground"}

    def ego_pose(self, t: float) -> np.ndarray:
        """(4, 4) world_T_ego at `t` seconds: it dives when it brakes, leans out of curves, and the road is not even."""
        x, y, heading = self.ego.at(t)
        before, after = self.ego.speed(t - 0.3), self.ego.speed(t + 0.3)
        turn = (self.ego.at(t + 0.3)[2] - self.ego.at(t - 0.3)[2]) / 0.6
        going = min(self.ego.speed(t) / 6, 1.0)
        waves = np.sin(np.array([1.7, 2.3, 2.9]) * t + self._phase) * going
        pitch = self._load[0] - 0.006 * (after - before) / 0.6 + 0.005 * waves[0]
        roll = self._load[1] + 0.004 * self.ego.speed(t) * turn + 0.005 * waves[1]
        return rigid(rotation_xyz(roll, pitch, heading), [x, y, 0.015 * waves[2]])

    @cached_property
    def ground(self) -> Ground:
        points = self.ego.at(np.arange(0, self.duration + 0.5, 0.5))[:, :2]
        return Ground((*(points.min(0) - 95), *(points.max(0) + 95)), paint_of(self.town, self.markings))

    def bodies(self, t: float) -> list[Placed]:
        """Everything that can be seen at `t` seconds. Owners are indices into `actors`, of those near enough."""
        ego = self.ego.at(t)[:2]
        placed = []
        for i, actor in enumerate(self.actors):
            rotation, centre = actor.pose(t)
            distance = np.hypot(*(centre[:2] - ego))
            if distance < SIGHT:
                owner = i if distance < REACH + 5 else -1
                placed.append(Placed(actor.body, rotation, centre, owner, actor.seed))
        fixed = self.scenery + [bodies[self.town.signals[node].state(group, t)] for node, group, bodies in self.signals]
        return placed + [item for item in fixed if np.hypot(*(item.position[:2] - ego)) < SIGHT]
