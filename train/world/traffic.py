"""Vehicles that drive through a town: each follows the one ahead, stops for lights, crossings and junctions.

Acceleration is that of the Intelligent Driver Model (Treiber, Hennecke and Helbing, 2000). A vehicle drives into a
junction once nobody holds a way through it that crosses its own, the lights allow it, and there is room behind it.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from .paths import BEFORE, STEP, Motion
from .town import SPACING, Route, Town

WARM = 5.0  # seconds simulated before a motion begins, in which queues form
ACCELERATION, BRAKING, HARD = 1.7, 2.2, 4.5  # m/s²: at most, at ease, when needed
HEADWAY, ROOM = 1.2, 1.5  # seconds and metres kept to the vehicle ahead
SIDEWAYS = 2.0  # m/s² that a driver accepts in a curve
OVER_BUMP = 3.0  # m/s
STOP_AT = 6.1  # metres from the end of a lane at which its stop line begins
LOOK = np.arange(0.5, 45.0, 1.25)  # metres ahead of its front at which a driver looks for others
CLOSER = 2.6  # metres between two ways through a junction that cross


@dataclass
class Vehicle:
    """One that is to be simulated.

    Args:
        start: arc length of its middle when the simulation begins.
        pause: (arc length, seconds) of a stop on the way, for a bus or a delivery.
        towed: metres from its end to that of its trailer.
    """

    category: str
    size: tuple[float, float, float]
    route: Route
    cruise: float
    start: float
    pause: tuple[float, float] | None = None
    towed: float = 0.0


def simulate(town: Town, vehicles: list[Vehicle], busy: dict, bumps: dict, duration: float) -> list[Motion]:
    """The motions of vehicles that share a town.

    Args:
        town: where.
        vehicles: who; the order decides who may go first where two arrive at once.
        busy: (road, end, side) → [(from, to), …], seconds in which a half of a crossing has people on it.
        bumps: road → s of its speed bump.
        duration: seconds.
    """
    return _Traffic(town, vehicles, busy, bumps).run(duration)


class _Traffic:
    def __init__(self, town, vehicles, busy, bumps):
        self.town, self.vehicles, self.busy = town, vehicles, busy
        length = max(len(vehicle.route.path.points) for vehicle in vehicles)
        self.way = np.stack([_padded(v.route.path, length) for v in vehicles])  # (N, L, 3) x, y, heading
        self.limit = np.stack([_speed_limit(town, v, bumps, length) for v in vehicles])  # (N, L)
        self.half = np.array([vehicle.size[1] / 2 for vehicle in vehicles])
        self.width = np.array([vehicle.size[0] for vehicle in vehicles])
        self.rear = self.half + [vehicle.towed for vehicle in vehicles]
        self.s = np.array([vehicle.start for vehicle in vehicles])
        self.speed = 0.8 * self._at(self.limit, self.s)
        self._discs()
        self.gate = [0] * len(vehicles)  # the next junction of each
        self.held = [[] for _ in vehicles]  # gates passed or granted whose junction is not left yet
        self.owner = {}  # connector → vehicles on it
        self.conflicts = {}
        self.crossings = [_crossings(town, vehicle.route) for vehicle in vehicles]
        self.waited = np.zeros(len(vehicles))

    def _discs(self):
        """Circles that cover each vehicle and its trailer, as arc lengths from its middle; NaN fills up."""
        rows = []
        for half, rear, width in zip(self.half, self.rear, self.width):
            first, last = half - width / 2, -rear + width / 2
            rows.append(np.linspace(first, last, max(int(np.ceil((first - last) / 2.0)), 1) + 1))
        self.offsets = np.full((len(rows), max(len(row) for row in rows)), np.nan)
        for row, offsets in zip(self.offsets, rows):
            row[: len(offsets)] = offsets
        self.disc_owner = np.broadcast_to(np.arange(len(rows))[:, None], self.offsets.shape)[~np.isnan(self.offsets)]
        self.apart = 0.5 * (self.width[:, None] + self.width[self.disc_owner]) + 0.1  # (N, discs)
        self.apart[np.arange(len(rows))[:, None] == self.disc_owner] = -1  # nobody is in his own way

    def _at(self, table, s):
        index = np.clip(np.rint(s / SPACING).astype(int), 0, table.shape[1] - 1)
        rows = np.arange(len(table)).reshape((-1,) + (1,) * (index.ndim - 1))
        return table[rows, index]

    def run(self, duration):
        steps = int(round((WARM + BEFORE + duration + 1) / STEP))
        track = np.empty((steps + 1, len(self.vehicles)))
        track[0] = self.s
        for step in range(steps):
            self._step(step * STEP - WARM - BEFORE)
            track[step + 1] = self.s
        kept = track[int(round(WARM / STEP)) :]
        return [Motion(vehicle.route.path, kept[:, i]) for i, vehicle in enumerate(self.vehicles)]

    def _step(self, t):
        gap, slower = self._leaders()
        wall = np.array([self._wall(i, t) for i in range(len(self.vehicles))])
        wanted = np.maximum(self._at(self.limit, self.s), 0.5)
        free = 1 - (self.speed / wanted) ** 4
        pull = np.maximum(
            self._closeness(gap, slower, ROOM), self._closeness(wall, np.zeros(len(wall)), 0.4, headway=0.3)
        )
        acceleration = np.clip(ACCELERATION * (np.maximum(free, -1.2) - pull), -7.0, ACCELERATION)
        speed = np.maximum(self.speed + acceleration * STEP, 0)
        near = np.minimum(gap - ROOM, wall - 0.4) < 0.8  # who has nearly arrived behind something does not creep on
        speed[(speed < 0.5) & near & (acceleration < 0.3)] = 0
        self.s = self.s + 0.5 * (self.speed + speed) * STEP
        self.speed = speed

    def _closeness(self, gap, leader, room, headway=HEADWAY):
        closing = self.speed * (self.speed - leader) / (2 * np.sqrt(ACCELERATION * BRAKING))
        return (np.maximum(room + self.speed * headway + closing, room) / np.maximum(gap, 0.1)) ** 2

    def _leaders(self):
        """(gap, speed along one's own way) of the first vehicle on everyone's way; infinite and 0 where it is free."""
        discs = self._at(self.way, self.s[:, None] + np.nan_to_num(self.offsets))[~np.isnan(self.offsets)]
        ahead = self._at(self.way, (self.s + self.half)[:, None] + LOOK)
        # A driver does not see past the end of his route; beyond it the way is its last point.
        distance = cdist(ahead[..., :2].reshape(-1, 2), discs[:, :2]).reshape(*ahead.shape[:2], -1)
        hit = distance < self.apart[:, None]
        blocked = hit.any(axis=2)
        first = blocked.argmax(axis=1)
        rows = np.arange(len(first))
        other = self.disc_owner[hit[rows, first].argmax(axis=1)]
        turn = ahead[rows, first, 2] - discs[hit[rows, first].argmax(axis=1), 2]
        along = np.maximum(self.speed[other] * np.cos(turn), 0)
        found = blocked.any(axis=1)
        return np.where(found, LOOK[first], np.inf), np.where(found, along, 0)

    def _wall(self, i, t) -> float:
        """Metres to the nearest place where vehicle `i` has to stop now."""
        vehicle, front, wall = self.vehicles[i], self.s[i] + self.half[i], np.inf
        gates = vehicle.route.gates
        while self.held[i] and self.s[i] - self.rear[i] > gates[self.held[i][0]].clear + 1:
            self.owner[gates[self.held[i].pop(0)].connector].remove(i)
        needed = self.speed[i] ** 2 / (2 * HARD)
        if self.gate[i] < len(gates):
            gate = gates[self.gate[i]]
            distance = gate.end - STOP_AT - front
            if distance < needed + 0.9 * self.speed[i] + 5:
                if distance < needed - 0.5 or self._may_enter(i, gate, t):
                    self.owner.setdefault(gate.connector, []).append(i)
                    self.held[i].append(self.gate[i])
                    self.gate[i] += 1
                else:
                    wall = distance
        for place, key in self.crossings[i]:
            distance = place - front
            if needed - 0.2 < distance < 40 and self._is_busy(key, t, t + min(distance / max(self.speed[i], 1), 4)):
                wall = min(wall, distance)
        if vehicle.pause and self.waited[i] < vehicle.pause[1]:
            distance = vehicle.pause[0] - front
            if needed - 0.2 < distance < 40:
                wall = min(wall, distance)
                self.waited[i] += STEP if distance < 2 and self.speed[i] == 0 else 0
        return max(wall, 0.0)

    def _may_enter(self, i, gate, t) -> bool:
        town = self.town
        connector = town.connectors[gate.connector]
        road = town.lanes[connector.source].road
        node = town.roads[road].nodes[1 if town.lanes[connector.source].direction > 0 else 0]
        signal = town.signals.get(node)
        if signal and signal.state(town.group(road), t) != "green":
            return False
        for other, holders in self.owner.items():
            if holders and other != gate.connector and self._cross(gate.connector, other):
                return False
        return self._has_room(i, gate)

    def _cross(self, a, b) -> bool:
        """Whether two ways through a junction come too close; those that part from one lane do not."""
        key = (min(a, b), max(a, b))
        if key not in self.conflicts:
            first, second = self.town.connectors[a], self.town.connectors[b]
            near = np.linalg.norm(first.points[0] - second.points[0]) < 60
            parting = first.source == second.source
            self.conflicts[key] = bool(near and not parting and cdist(first.points, second.points).min() < CLOSER)
        return self.conflicts[key]

    def _has_room(self, i, gate) -> bool:
        """Whether nobody stands where the vehicle would come to stand behind the junction."""
        beyond = np.arange(0.0, 6.0 + self.half[i] + self.rear[i], 1.5) + gate.clear
        places = self._at(self.way[i : i + 1], beyond[None])[0, :, :2]
        others = (np.arange(len(self.s)) != i) & (self.speed < 1.5)
        tails = self._at(self.way, (self.s - self.rear)[:, None])[:, 0, :2][others]
        return not len(tails) or cdist(places, tails).min() > 1.6

    def _is_busy(self, key, start, end) -> bool:
        return any(first < end and start < last for first, last in self.busy.get(key, ()))


def _padded(path, length):
    rows = np.column_stack([path.points, path.heading])
    return np.concatenate([rows, np.repeat(rows[-1:], length - len(rows), axis=0)])


def _speed_limit(town, vehicle, bumps, length):
    """(L,) m/s at every point of a route: slower in curves and over bumps, with time to brake."""
    path = vehicle.route.path
    heading = np.unwrap(path.heading)
    curvature = np.abs(np.gradient(heading, path.arc)) if len(heading) > 2 else np.zeros(len(heading))
    curvature = np.convolve(np.pad(curvature, 3, mode="edge"), np.full(7, 1 / 7), mode="valid")
    limit = np.minimum(vehicle.cruise, np.sqrt(SIDEWAYS / np.maximum(curvature, 1e-4)))
    for lane in vehicle.route.lanes:
        road = town.lanes[lane].road
        if road in bumps:
            middle = town.roads[road].point(bumps[road], 0.0)
            limit[np.linalg.norm(path.points - middle, axis=1) < town.roads[road].edge + 1] = OVER_BUMP
    limit[-int(25 / SPACING) :] = np.minimum(limit[-int(25 / SPACING) :], 6.0)
    for i in range(len(limit) - 2, -1, -1):
        limit[i] = min(limit[i], np.sqrt(limit[i + 1] ** 2 + 2 * 1.6 * SPACING))
    return np.concatenate([limit, np.zeros(length - len(limit))])


def _crossings(town, route):
    """[(arc length at which to stop, key of `busy`), …] of the halves of crossings that a route passes."""
    found = []
    for gate in route.gates:
        connector = town.connectors[gate.connector]
        before, after = town.lanes[connector.source], town.lanes[connector.target]
        found.append((gate.end - STOP_AT, (before.road, 1 if before.direction > 0 else 0, -before.direction)))
        found.append((gate.clear - 0.2, (after.road, 0 if after.direction > 0 else 1, -after.direction)))
    return found
