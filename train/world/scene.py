"""A drive through a town: the ego vehicle's motion and everything annotated along its way.

Near the start of every drive stand objects of all ten detection classes, so that even a short world has them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..data.poses import rigid, rotation_xyz, rotation_z
from .casting import Placed
from .ground import Ground
from .paths import Motion, boxes_meet, drive, still, stroll
from .shading import Light
from .shapes import body_for
from .town import LANE, PARKING, WALKWAY, build_town

TOWNS = 4  # as many as nuScenes has places: the devkit opens maps of those names only
PERIOD = 0.5  # seconds between samples
REACH = 80.0  # metres; objects farther than this from the ego vehicle are not annotated
EGO_SIZE = (1.9, 4.6)
SIZES = {
    "vehicle.car": (1.92, 4.6, 1.68),
    "vehicle.truck": (2.4, 6.8, 2.9),
    "vehicle.trailer": (2.4, 9.0, 3.6),
    "vehicle.bus.rigid": (2.7, 10.8, 3.4),
    "vehicle.construction": (2.4, 5.6, 2.7),
    "vehicle.motorcycle": (0.75, 2.05, 1.15),
    "vehicle.bicycle": (0.6, 1.75, 1.1),
    "human.pedestrian.adult": (0.68, 0.74, 1.75),
    "human.pedestrian.child": (0.48, 0.50, 1.25),
    "human.pedestrian.construction_worker": (0.68, 0.74, 1.78),
    "movable_object.trafficcone": (0.42, 0.42, 0.78),
    "movable_object.barrier": (2.2, 0.6, 1.05),
}


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
        x, y, heading = self.motion.at(t)
        return rotation_z(heading), np.array([x, y, self.size[2] / 2])

    def attribute(self, t: float) -> str | None:
        """nuScenes' attribute at `t` seconds; None for classes that have none."""
        moving = self.motion.speed(t) > 0.2
        kind = self.category.split(".")
        if kind[0] == "human":
            return "pedestrian.moving" if moving else "pedestrian.standing"
        if kind[0] != "vehicle":
            return None
        if kind[1] in ("bicycle", "motorcycle"):
            return "cycle.without_rider" if self.parked else "cycle.with_rider"
        return "vehicle.parked" if self.parked else "vehicle.moving" if moving else "vehicle.stopped"


class Scene:
    """Scene `index` of the world of `seed`; the same whatever other scenes are made.

    Args:
        seed, index: what follows is a function of these and of `samples` alone.
        samples: number of key frames, half a second apart.
    """

    def __init__(self, seed: int, index: int, samples: int):
        self.index, self.samples = index, samples
        self.place = index % TOWNS
        self.town = build_town(seed, self.place)
        self.rng = np.random.default_rng([seed, 202, index])
        self.duration = samples * PERIOD
        self.actors: list[Actor] = []
        self._tracks: list[np.ndarray] = []
        self._times = np.arange(-0.5, self.duration + 0.5, 0.25)
        azimuth = self.rng.uniform(0, 2 * np.pi)
        rise = np.radians(self.rng.uniform(35, 60))
        sun = np.array([np.cos(rise) * np.cos(azimuth), np.cos(rise) * np.sin(azimuth), np.sin(rise)])
        self.light = Light(sun=tuple(sun), clouds=self.rng.uniform(0.3, 0.8))
        self.route, self.first_lane = self._choose_route()
        self._populate()

    def ego_pose(self, t: float) -> np.ndarray:
        """(4, 4) world_T_ego at `t` seconds, rolling and pitching a little on its springs."""
        x, y, heading = self.ego.at(t)
        roll, pitch = 0.006 * np.sin(1.7 * t + 1), 0.005 * np.sin(2.3 * t)
        return rigid(rotation_xyz(roll, pitch, heading), [x, y, 0.0])

    @cached_property
    def ground(self) -> Ground:
        points = self.ego.at(np.arange(0, self.duration + 0.5, 0.5))[:, :2]
        return Ground((*(points.min(0) - 95), *(points.max(0) + 95)), self.town.paint)

    def bodies(self, t: float) -> list[Placed]:
        """Everything that can be seen at `t` seconds. Owners are indices into `actors`."""
        moving = [Placed(a.body, *a.pose(t), owner=i, seed=a.seed) for i, a in enumerate(self.actors)]
        ego = self.ego.at(t)[:2]
        return moving + [item for item in self.town.scenery if np.hypot(*(item.position[:2] - ego)) < 190]

    def _choose_route(self):
        rng, town = self.rng, self.town
        middle = np.mean([road.point(road.length / 2, 0.0) for road in town.roads], axis=0)
        long = [i for i, lane in enumerate(town.lanes) if town.roads[lane.road].length > 52]
        # Away from the edge of the town, where the view would end in nothing.
        distance = [np.linalg.norm(town.lanes[i].points.mean(0) - middle) for i in long]
        near = [long[i] for i in np.argsort(distance, kind="stable")[: len(long) // 2]]
        first = near[rng.integers(len(near))]
        path, self.roads = town.walk(rng, first, 60 + 11 * self.duration)
        return path, town.lanes[first]

    def _populate(self):
        rng = self.rng
        self.ego = drive(self.route, 5.0, rng.uniform(6.0, 9.0), self.duration)
        self.ego_track = self.ego.at(self._times)
        self._tracks.append(self.ego_track)
        self._extents = [np.array(EGO_SIZE)]
        self._set_pieces()
        for gap, category in ((rng.uniform(16, 22), "vehicle.car"), (-rng.uniform(11, 14), "vehicle.car")):
            self._add(category, Motion(self.route, self.ego.distance + gap))
        close = [i for i, road in enumerate(self.town.roads) if self._near_route(road.point(road.length / 2, 0.0), 95)]
        self._traffic(close)
        for road in close:
            self._park(self.town.roads[road])
            self._stroll(self.town.roads[road])

    def _near_route(self, point, reach) -> bool:
        return bool(np.hypot(*(self.ego_track[:, :2] - point).T).min() < reach)

    def _add(self, category, motion: Motion, parked=False) -> bool:
        """Adds an actor unless it would run into another one."""
        size = np.array(SIZES[category]) * self.rng.uniform(0.94, 1.06, 3)
        if category in ("vehicle.bicycle", "vehicle.motorcycle") and not parked:
            size[2] = 1.75  # the rider
        seed = int(self.rng.integers(2**20))
        track = motion.at(self._times)
        if boxes_meet(track, size[:2] + 0.25, np.array(self._tracks), np.array(self._extents)):
            return False
        self.actors.append(Actor(category, tuple(size.round(3).tolist()), motion, seed, parked))
        self._tracks.append(track)
        self._extents.append(size[:2])
        return True

    def _set_pieces(self):
        """A building site on the right of the first street, a lorry, a trailer and a bus on the left."""
        road, direction = self.town.roads[self.first_lane.road], self.first_lane.direction
        heading = road.heading + (0 if direction > 0 else np.pi)
        start = 11.0

        def place(category, ahead, left, turn=0.0, **options):
            s = (start + ahead) if direction > 0 else road.length - (start + ahead)
            x, y = road.point(s, direction * left)
            self._add(category, still(x, y, heading + turn), **options)

        strip, kerb = road.half - PARKING / 2, road.half
        for ahead in (3.5, 5.5, 17.0):
            place("movable_object.trafficcone", ahead, -strip + 0.9)
        place("vehicle.construction", 10.5, -strip, parked=True)
        for ahead in (15.0, 19.0):
            place("movable_object.barrier", ahead, -strip, turn=np.pi / 2)
        place("human.pedestrian.construction_worker", 7.0, -strip, turn=1.0)
        place("vehicle.bicycle", 2.5, -kerb - 1.6, turn=0.3, parked=True)
        place("vehicle.motorcycle", 22.5, -strip, turn=0.5, parked=True)
        place("human.pedestrian.adult", 5.0, -kerb - 1.8, turn=2.0)
        place("human.pedestrian.child", 5.6, -kerb - 1.0, turn=2.4)
        place("vehicle.truck", 3.5, strip, turn=np.pi, parked=True)
        place("vehicle.trailer", 13.0, strip, turn=np.pi, parked=True)
        place("vehicle.bus.rigid", 25.0, strip, turn=np.pi)

    def _traffic(self, close):
        rng, town = self.rng, self.town
        lanes = [i for i, lane in enumerate(town.lanes) if lane.road in close]
        kinds = ["vehicle.car"] * 7 + ["vehicle.truck", "vehicle.bus.rigid", "vehicle.motorcycle", "vehicle.bicycle"]
        for _ in range(min(3 * len(lanes), 40)):
            category = kinds[rng.integers(len(kinds))]
            path, _ = town.walk(rng, lanes[rng.integers(len(lanes))], 60 + 9 * self.duration)
            if category == "vehicle.bicycle":
                path = path.shifted(-1.1)
            cruise = rng.uniform(3.0, 4.5) if category == "vehicle.bicycle" else rng.uniform(5, 9)
            self._add(category, drive(path, rng.uniform(0, 35), cruise, self.duration))
        for number in lanes:  # some wait at a stop line
            lane, road = town.lanes[number], town.roads[town.lanes[number].road]
            if rng.random() < 0.25:
                heading = road.heading + (0 if lane.direction > 0 else np.pi)
                forward = np.array([np.cos(heading), np.sin(heading)])
                self._add("vehicle.car", still(*(lane.points[1] - 9.0 * forward), heading))

    def _park(self, road):
        rng = self.rng
        kinds = ["vehicle.car"] * 9 + ["vehicle.truck", "vehicle.motorcycle"]
        for side in (-1, 1):
            full = rng.uniform(0.35, 0.85)
            for s in np.arange(12.0, road.length - 10, 6.2):
                if rng.random() < full:
                    x, y = road.point(s + rng.uniform(-0.4, 0.4), side * (road.lanes * LANE + PARKING / 2 + 0.05))
                    heading = road.heading + (0 if side < 0 else np.pi) + rng.normal(0, 0.02)
                    self._add(kinds[rng.integers(len(kinds))], still(x, y, heading), parked=True)

    def _stroll(self, road):
        rng = self.rng
        for side in (-1, 1):
            for _ in range(rng.integers(2, 6)):
                t = side * (road.half + rng.uniform(1.5, WALKWAY - 0.5))
                ends = road.point(np.array([0.0, road.length]), np.full(2, t))[:: rng.choice([-1, 1])]
                speed = rng.uniform(0.8, 1.6) if rng.random() < 0.75 else 0.0
                category = "human.pedestrian.child" if rng.random() < 0.12 else "human.pedestrian.adult"
                begin = rng.uniform(0, max(road.length - speed * (self.duration + 1), 1.0))
                self._add(category, stroll(*ends, begin, speed, self.duration))
            if rng.random() < 0.3:
                x, y = road.point(rng.uniform(8, road.length - 8), side * (road.half + 1.7))
                self._add("vehicle.bicycle", still(x, y, rng.uniform(0, 6.3)), parked=True)
        for s in (2.6, road.length - 2.6):  # on the crossings
            if rng.random() < 0.5:
                ends = road.point(np.full(2, s), np.array([-1, 1]) * (road.half + 1))[:: rng.choice([-1, 1])]
                self._add("human.pedestrian.adult", stroll(*ends, rng.uniform(0, 8), 1.2, self.duration))
