"""Who is in a town while the ego vehicle drives through it: traffic, parked vehicles, building sites, people."""

from dataclasses import dataclass

import numpy as np

from .actors import Actor, draw_size
from .paths import Motion, Path, boxes_meet, still, stroll
from .scenery import obstacles
from .sight import Sight
from .town import WALKWAY, Town, find_route
from .traffic import WARM, Vehicle, simulate

EGO_SIZE = (1.9, 4.6, 1.7)
REACHED = 95.0  # metres from the ego vehicle's way within which a road is peopled
TRAFFIC = 24  # vehicles in motion, at most
KINDS = {  # of vehicles in traffic
    "vehicle.car": 70, "vehicle.truck": 9, "vehicle.bus.rigid": 5, "vehicle.motorcycle": 6, "vehicle.bicycle": 7,
    "vehicle.construction": 1, "vehicle.trailer": 3,
}  # fmt: skip
PARKED = {
    "vehicle.car": 82, "vehicle.truck": 7, "vehicle.motorcycle": 5, "vehicle.bus.rigid": 2, "vehicle.trailer": 3,
    "vehicle.construction": 1,
}  # fmt: skip
# A short drive still has each of the ten detection classes: one is put in sight within so many metres where none is.
SHOWN = {
    "vehicle.car": 30, "vehicle.truck": 35, "vehicle.trailer": 35, "vehicle.bus.rigid": 35, "vehicle.construction": 32,
    "vehicle.motorcycle": 24, "vehicle.bicycle": 22, "human.pedestrian.adult": 22, "movable_object.trafficcone": 16,
    "movable_object.barrier": 22,
}  # fmt: skip


@dataclass
class Population:
    ego: Motion
    actors: list[Actor]


def populate(town: Town, markings, scenery, times, duration: float, rng) -> Population:
    """Everybody who is in a town for `duration` seconds.

    Args:
        times: seconds of the key frames.
        scenery: what already stands there.
        rng: source of everything random.
    """
    for _ in range(5):  # a drive begins with a vehicle that drives
        crowd = _Crowd(town, markings, scenery, duration, rng)
        crowd.start_traffic()
        if crowd.ego.travelled(1.5) - crowd.ego.travelled(0.0) > 3:
            break
    for _ in range(1 + (duration > 15)):
        crowd.build_site()
    for road in crowd.close:
        crowd.park(road)
        crowd.stroll(road)
    crowd.show_every_class(scenery, times)
    return Population(crowd.ego, crowd.actors)


def _draw(kinds, rng) -> str:
    chances = np.array(list(kinds.values()), dtype=float)
    return list(kinds)[rng.choice(len(chances), p=chances / chances.sum())]


class _Crowd:
    def __init__(self, town, markings, scenery, duration, rng):
        self.town, self.markings, self.duration, self.rng = town, markings, duration, rng
        self.times = np.arange(-0.5, duration + 0.5, 0.25)
        self.fixed = obstacles(scenery)
        self.actors: list[Actor] = []
        self.tracks, self.extents = [], []
        self.cruise = rng.uniform(*town.style.speeds)
        self.route = find_route(town, rng, self._first_lane(), 90 + self.cruise * (duration + 10), (1.0, 1.0, 0.35))
        way = self.route.path.points[: int((60 + self.cruise * (duration + 2)) / 0.5)]
        self.close = [i for i, road in enumerate(town.roads) if self._meets(road, way)]

    def _first_lane(self):
        """A lane away from the edge of the town, where there is less to see."""
        town = self.town
        distance = [np.linalg.norm(lane.points.mean(0) - town.nodes.mean(0)) for lane in town.lanes]
        nearest = np.argsort(distance, kind="stable")[: len(distance) // 2]
        return int(nearest[self.rng.integers(len(nearest))])

    def _meets(self, road, way):
        points = road.point(road.length * np.array([0.1, 0.5, 0.9]), np.zeros(3))
        return bool(np.linalg.norm(way[::10, None] - points, axis=2).min() < REACHED)

    def add(self, category, motion: Motion, size=None, parked=False, gap=0.25) -> bool:
        """Adds an actor unless it would run into another one."""
        ridden = category in ("vehicle.bicycle", "vehicle.motorcycle") and not parked
        size = size or draw_size(category, self.rng, ridden)
        seed = int(self.rng.integers(2**20))
        track = motion.at(self.times)
        if self._met(track, np.array(size[:2]) + gap).any() or self._stands_in_something(track, size):
            return False
        self.actors.append(Actor(category, size, motion, seed, parked))
        self._remember(track, size)
        return True

    def _met(self, track, size):
        """Which tracks, the ego vehicle's first, a box on a track would touch."""
        return boxes_meet(track, size, np.array(self.tracks), np.array(self.extents)[:, :2])

    def _stands_in_something(self, track, size) -> bool:
        near = np.linalg.norm(self.fixed[:, :2] - track[0, :2], axis=1) < 30 + np.ptp(track[:, :2], axis=0).sum()
        boxes = self.fixed[near]
        others = np.broadcast_to(boxes[:, None, :3], (len(boxes), len(track), 3))
        return bool(boxes_meet(track, np.array(size[:2]) + 0.1, others, boxes[:, 3:]).any())

    def _remember(self, track, size):
        self.tracks.append(track)
        self.extents.append(np.array(size))

    def start_traffic(self):
        """Simulates the ego vehicle and those around it; of two that would touch, the later one is left out."""
        crossers, busy = self._crossers()
        bumps = {bump.road: bump.s for bump in self.markings.bumps}
        vehicles, trailers = self._vehicles()
        motions = simulate(self.town, vehicles, busy, bumps, self.duration)
        self.ego = motions[0]
        self._remember(self.ego.at(self.times), EGO_SIZE)
        for number, (vehicle, motion) in enumerate(zip(vehicles[1:], motions[1:]), 1):
            if self.add(vehicle.category, motion, vehicle.size) and number in trailers:
                size, behind = trailers[number]
                if not self.add("vehicle.trailer", Motion(motion.path, motion.distance - behind), size, gap=0.0):
                    self._remove(len(self.actors) - 1)
        for category, motion in crossers:
            self.add(category, motion)

    def _vehicles(self):
        """The ego vehicle first, one ahead of it, one behind it, then others; and the trailers some of them tow."""
        rng, town = self.rng, self.town
        start = rng.uniform(14, 24)
        vehicles, trailers = [Vehicle("vehicle.car", EGO_SIZE, self.route, self.cruise, start)], {}
        first = self.route.lanes[0]
        lanes = [i for i, lane in enumerate(town.lanes) if lane.road in self.close]
        wanted = [
            ("vehicle.car", first, start + rng.uniform(13, 22)),
            ("vehicle.car", first, start - rng.uniform(9, 12)),
        ]
        for _ in range(min(2 * len(lanes), TRAFFIC)):
            lane = lanes[rng.integers(len(lanes))]
            wanted.append(
                (_draw(KINDS, rng), lane, rng.uniform(3, max(town.roads[town.lanes[lane].road].length - 8, 4)))
            )
        taken = [(first, start - 2.3, start + 2.3)]
        for category, lane, s in wanted:
            tows = category == "vehicle.trailer"
            category = "vehicle.truck" if tows else category
            size = draw_size(category, rng, ridden=True) if "cycle" in category else draw_size(category, rng)
            trailer = draw_size("vehicle.trailer", rng) if tows else None
            towed = trailer[1] + 0.8 if tows else 0.0
            front, rear = s + size[1] / 2, s - size[1] / 2 - towed
            if any(lane == other and rear < high + 3 and front > low - 3 for other, low, high in taken) or rear < -2:
                continue
            taken.append((lane, rear, front))
            if tows:
                trailers[len(vehicles)] = (trailer, size[1] / 2 + 0.8 + trailer[1] / 2)
            vehicles.append(self._vehicle(category, size, lane, s, towed))
        return vehicles, trailers

    def _vehicle(self, category, size, lane, s, towed):
        rng = self.rng
        low, high = self.town.style.speeds
        cruise = rng.uniform(0.8 * low, 1.05 * high)
        aside, pause = 0.0, None
        if category == "vehicle.bicycle":
            cruise, aside = rng.uniform(3.0, 4.5), -(self.town.style.lane / 2 - 0.32)
        elif category == "vehicle.construction":
            cruise = rng.uniform(3.0, 5.0)
        elif category in ("vehicle.bus.rigid", "vehicle.truck") and rng.random() < 0.4:
            pause = (s + rng.uniform(25, 90), rng.uniform(4, 12))
        route = find_route(self.town, rng, lane, 90 + cruise * (self.duration + WARM + 4), aside=aside)
        return Vehicle(category, size, route, cruise, s, pause, towed)

    def _crossers(self):
        """People who cross the roads, when lights hold the traffic or drivers let them, and when crossings are busy."""
        rng, town, people, busy = self.rng, self.town, [], {}
        for number, end, s0, s1 in town.crossings():
            if number not in self.close:
                continue
            road = town.roads[number]
            for start in self._start_times(number, end):
                side = rng.choice([-1, 1])
                reach = road.half + 1.0
                ends = road.point(np.full(2, rng.uniform(s0 + 0.6, s1 - 0.6)), np.array([side, -side]) * reach)
                speed = rng.uniform(1.2, 1.8)
                category = "human.pedestrian.child" if rng.random() < 0.12 else "human.pedestrian.adult"
                people.append((category, stroll(ends, -speed * (start + 1), speed, self.duration)))
                near = start - 1.5, start + (reach + 1.5) / speed
                far = start + (reach - 1.8) / speed, start + 2 * reach / speed
                busy.setdefault((number, end, int(side)), []).append(near)
                busy.setdefault((number, end, int(-side)), []).append(far)
        return people, busy

    def _start_times(self, number, end):
        rng, town = self.rng, self.town
        signal = town.signals.get(town.roads[number].nodes[end])
        if signal is None:
            return rng.uniform(0, self.duration + 3, rng.poisson((self.duration + 3) / 35))
        red = signal.green + signal.yellow - signal.offset - town.group(number) * signal.cycle / 2
        starts = red + signal.cycle * np.arange(-2, int(self.duration / signal.cycle) + 4)
        starts = starts[(starts > -1) & (starts < self.duration + 2)]
        return np.concatenate([start + rng.uniform(0.5, 3.5, rng.integers(0, 3)) for start in starts] or [np.zeros(0)])

    def build_site(self):
        """A building site on a parking strip or a walkway: barriers and cones, workers, a machine."""
        rng = self.rng
        number = self.close[rng.integers(len(self.close))]
        road, side = self.town.roads[number], rng.choice([-1, 1])
        long = rng.uniform(9, 20)
        start = rng.uniform(9, max(road.length - long - 9, 9.5))
        inner = road.edge + 0.45 if road.bay else road.half + 0.9
        deep = (road.bay if road.bay else WALKWAY) - 0.8

        def place(category, s, t, turn=0.0, **options):
            x, y = road.point(s, side * t)
            return self.add(category, still(x, y, road.heading(s) + turn), **options)

        machine = rng.uniform(0.35, 0.65) * long
        if rng.random() < 0.8:
            turn = rng.choice([0, np.pi]) + rng.normal(0, 0.1)
            place("vehicle.construction", start + machine, inner + 0.55 * deep, turn, parked=True)
        for s in np.arange(0, long, rng.uniform(2.6, 4.0)):  # along the traffic
            kind = "movable_object.barrier" if rng.random() < 0.55 else "movable_object.trafficcone"
            turn = np.pi / 2 + rng.normal(0, 0.08)
            place(kind, start + s, inner + rng.uniform(-0.1, 0.25), turn)
        for s in (-1.2, long + 1.2):  # across it, at both ends
            place("movable_object.barrier", start + s, inner + 0.5 * deep, rng.normal(0, 0.15))
        for _ in range(rng.integers(1, 4)):
            place("movable_object.trafficcone", start - rng.uniform(2, 7), inner + rng.uniform(0, 0.8))
        for _ in range(rng.integers(1, 4)):
            s, t = rng.uniform(0, long), inner + rng.uniform(0.6, deep + 0.8)
            place("human.pedestrian.construction_worker", start + s, t, rng.uniform(0, 6.3))

    def park(self, number):
        """Vehicles in the slots of a road; long ones take several."""
        rng, road = self.rng, self.town.roads[number]
        for side in (-1, 1):
            full = rng.uniform(0.35, 0.85)
            for slot in (slot for slot in self.markings.slots if slot.road == number and slot.side == side):
                if rng.random() < full:
                    self._park_in(road, slot, _draw(PARKED, rng))

    def _park_in(self, road, slot, category):
        rng = self.rng
        size = draw_size(category, rng)
        middle, across = (slot.s0 + slot.s1) / 2, road.bay > slot.s1 - slot.s0  # nose to the kerb
        if size[1] > road.bay - 0.1 and across:
            return
        deep = road.edge + road.bay / 2 if across else min(road.edge + 0.55 * road.bay, road.half - size[0] / 2)
        s = middle + (0 if across else rng.uniform(-0.3, 0.3))
        if abs(s - road.length / 2) > road.length / 2 - 7 - size[1] / 2:
            return
        x, y = road.point(s, slot.side * deep)
        along = road.heading(s) + (0 if slot.side < 0 else np.pi)
        heading = along + rng.choice([-1, 1]) * np.pi / 2 if across else along
        if category == "vehicle.motorcycle":
            heading += rng.uniform(-1.2, 1.2)
        self.add(category, still(x, y, heading + rng.normal(0, 0.025)), size, parked=True)

    def stroll(self, number):
        """People and bicycles on the walkways of a road."""
        rng, road = self.rng, self.town.roads[number]
        for side in (-1, 1):
            for _ in range(rng.integers(0, 4)):
                line = road.line(0, road.length, side * (road.half + rng.uniform(1.5, WALKWAY - 0.4)))
                speed = rng.uniform(0.8, 1.7) if rng.random() < 0.75 else 0.0
                begin = rng.uniform(0, max(road.length - speed * (self.duration + 1), 1.0))
                company = rng.integers(1, 4) if rng.random() < 0.25 else 1
                way = line[:: rng.choice([-1, 1])]
                for k in range(company):
                    category = "human.pedestrian.child" if rng.random() < 0.12 else "human.pedestrian.adult"
                    beside = Path(way).shifted(0.85 * (k % 2)).points if k else way
                    self.add(category, stroll(beside, begin + 0.9 * (k // 2), speed, self.duration))
            if rng.random() < 0.35:
                x, y = road.point(rng.uniform(8, road.length - 8), side * (road.half + 1.9))
                self.add("vehicle.bicycle", still(x, y, rng.uniform(0, 6.3)), parked=True)

    def show_every_class(self, scenery, times):
        """Puts one of each class that is nowhere in sight at a random spot beside the way."""
        sight = Sight(scenery)
        for category, reach in [*SHOWN.items()] * 2:  # what comes later may hide what came before
            alike = "human" if category.startswith("human") else category
            like = [i for i, actor in enumerate(self.actors) if actor.category.startswith(alike)]
            if not any(self._sees(sight, i, t, reach) for t in times[:: max(len(times) // 6, 1)] for i in like):
                self._show(category, reach, times, sight)

    def _sees(self, sight, number, t, reach) -> bool:
        """Whether the ego vehicle, the first of all tracks, sees actor `number`."""
        at = round((t - self.times[0]) / (self.times[1] - self.times[0]))
        rows = np.column_stack([np.array([track[at] for track in self.tracks]), np.array(self.extents)])
        others = np.delete(rows[1:], number, axis=0)
        return sight.sees(rows[0, :2], rows[number + 1], reach, others)

    def _show(self, category, reach, times, sight):
        """Tries random spots beside roads near the way, at random times, until one is in sight."""
        rng = self.rng
        for _ in range(25):
            t = times[rng.integers(len(times))]
            size = max(draw_size(category, rng), draw_size(category, rng), key=lambda size: size[2])
            spots = self._spots(category, size)
            spots = spots[np.linalg.norm(spots[:, :2] - self.ego.at(t)[:2], axis=1) < reach]
            for spot in spots[rng.permutation(len(spots))[:12]]:
                motion, before = still(*spot), len(self.actors)
                towed = self._tow_away(motion, size)
                if self.add(category, motion, size, parked=category.startswith("vehicle")):
                    if self._sees(sight, len(self.actors) - 1, t, reach):
                        return
                    self._remove(len(self.actors) - 1)
                for actor in towed:
                    self.actors.append(actor)
                    self._remember(actor.motion.at(self.times), actor.size)
                assert len(self.actors) == before

    def _spots(self, category, size):
        """(N, 3) x, y, heading of places where one of a category may stand: in a bay or on a walkway."""
        rng, spots = self.rng, []
        large = category.startswith("vehicle") and "cycle" not in category
        for road in (self.town.roads[number] for number in self.close):
            s, side = rng.uniform(8, road.length - 8, 50), rng.choice([-1, 1], 50)
            in_bay = max(road.edge + 0.12 + size[0] / 2, road.edge + 0.5 * road.bay)
            if large:
                aside = np.full(50, in_bay if road.bay else road.half - 0.15 - size[0] / 2)  # or stands at the kerb
                turn = np.where(side < 0, 0, np.pi) + rng.normal(0, 0.05, 50)
            else:
                beside = rng.uniform(road.edge + 0.5, road.half - 0.4, 50) if road.bay else road.half + 0.6
                aside = np.where(rng.random(50) < 0.6, beside, road.half + rng.uniform(0.6, 2.4, 50))
                turn = rng.uniform(0, 6.3, 50)
            points = [road.point(*place) for place in zip(s, side * aside)]
            spots.append(np.column_stack([points, road.heading(s) + turn]))
        return np.concatenate(spots)

    def _tow_away(self, motion, size) -> list[Actor]:
        """Makes room where nothing but parked cars is in the way; those that went."""
        hit = np.flatnonzero(self._met(motion.at(self.times), np.array(size[:2]) + 0.3)) - 1  # the first is the ego
        if any(i < 0 or not self.actors[i].parked or self.actors[i].category != "vehicle.car" for i in hit):
            return []
        towed = [self.actors[i] for i in hit]
        for i in sorted(hit, reverse=True):
            self._remove(i)
        return towed

    def _remove(self, number):
        del self.actors[number], self.tracks[number + 1], self.extents[number + 1]
