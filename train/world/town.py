"""The streets of a generated town: roads, lanes, junctions and their signals. All of it follows from one seed.

Every scene has a town of its own. The towns of one map lie side by side on square tiles, far enough apart that
nothing of one is seen from another.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt

import numpy as np
import shapely

from .paths import Path, bezier

NODES = 4  # junctions along each side of a town
MARGIN, TILE = 66.0, 448.0  # metres from a tile's edge to its outer junctions, and its sides
WALKWAY = 3.0  # metres
GUTTER = 0.5  # metres from the edge line to the kerb where nobody parks
SPACING = 0.5  # metres between the points of a route


@dataclass(frozen=True)
class Style:
    """What kind of town it is; lengths in metres."""

    spacing: tuple[float, float]  # between junctions
    mouth: float  # a road ends so far before the middle of its junction
    lane: float
    wide: float  # share of streets with two lanes each way
    bayed: float  # share of roads with parking bays
    bay: float  # depth of a bay, across the road
    slot: float  # its length along the road
    bend: float  # how far the middle of a road may lie off its straight
    bumps: float  # share of roads with a speed bump
    walls: float  # share of frontages that are a wall
    signals: float  # share of junctions of three or four roads with lights
    speeds: tuple[float, float]  # m/s, on an open road


STYLES = {
    "streets": Style((72, 100), 15.0, 3.5, 0.45, 0.75, 2.6, 6.2, 4.0, 0.2, 0.15, 0.4, (7.5, 11.5)),
    "parking": Style((62, 84), 13.0, 3.0, 0.0, 1.0, 5.2, 2.6, 0.0, 0.6, 0.6, 0.0, (3.0, 5.0)),
}


@dataclass
class Lane:
    road: int
    direction: int  # +1 with the road, -1 against it
    index: int  # 0 is next to the middle
    points: np.ndarray  # (N, 2)
    following: list[int] = field(default_factory=list)  # connectors that start at its end


@dataclass
class Connector:
    source: int
    target: int
    turn: str  # left, right or ahead
    points: np.ndarray  # (N, 2)


@dataclass
class Road:
    """A street between two junctions, in its own coordinates: s along the straight between them, t to the left.

    A bent road is the straight one with every point moved to the left by a smooth hump of `bend` metres.
    """

    nodes: tuple[int, int]
    start: np.ndarray
    along: np.ndarray  # unit
    length: float
    lanes: int  # each way
    lane: float  # width of a lane
    bay: float  # depth of the parking bays on both sides, 0 for none
    bend: float = 0.0

    @property
    def edge(self) -> float:
        """Metres from the middle to the outer lane's edge."""
        return self.lanes * self.lane

    @property
    def half(self) -> float:
        """Metres from the middle to the kerb."""
        return self.edge + (self.bay or GUTTER)

    def heading(self, s=0.0):
        """Direction of the road at `s`, radians."""
        slope = self.bend * np.pi / self.length * np.sin(2 * np.pi * np.clip(s, 0, self.length) / self.length)
        return np.arctan2(self.along[1], self.along[0]) + np.arctan(slope)

    def point(self, s, t) -> np.ndarray:
        """(..., 2) world coordinates."""
        left = np.array([-self.along[1], self.along[0]])
        hump = self.bend * np.sin(np.pi * np.clip(s, 0, self.length) / self.length) ** 2
        return self.start + np.multiply.outer(s, self.along) + np.multiply.outer(t + hump, left)

    def line(self, s0, s1, t) -> np.ndarray:
        """(N, 2) the way from `s0` to `s1` at one `t`; two points where the road is straight."""
        count = 1 if not self.bend else max(int(np.ceil(abs(s1 - s0))), 1)
        return self.point(np.linspace(s0, s1, count + 1), np.full(count + 1, float(t)))

    def strip(self, s0, s1, t0, t1) -> np.ndarray:
        """(N, 2) corners of the area between two s and two t, counter-clockwise."""
        return np.concatenate([self.line(s0, s1, min(t0, t1)), self.line(s1, s0, max(t0, t1))])


@dataclass(frozen=True)
class Signal:
    """The lights of a junction: its roads take turns in two groups, those that run east and those that run north."""

    offset: float
    green: float = 9.0
    yellow: float = 2.0
    clear: float = 1.0

    @property
    def cycle(self) -> float:
        return 2 * (self.green + self.yellow + self.clear)

    def state(self, group: int, t: float) -> str:
        """`green`, `yellow` or `red` for the roads of a group at `t` seconds."""
        into = (t + self.offset + group * self.cycle / 2) % self.cycle
        return "green" if into < self.green else "yellow" if into < self.green + self.yellow else "red"


@dataclass
class Town:
    style: Style
    nodes: np.ndarray  # (N, 2) middles of the junctions
    roads: list[Road]
    junctions: list[np.ndarray]  # polygons
    lanes: list[Lane]
    connectors: list[Connector]
    signals: dict[int, Signal]  # by junction

    def crossings(self):
        """(road, end, s0, s1) of each pedestrian crossing; end 0 is where the road starts, 1 where it ends."""
        for number, road in enumerate(self.roads):
            yield number, 0, 0.6, 4.6
            yield number, 1, road.length - 4.6, road.length - 0.6

    def walkways(self):
        """Polygons of the walkways along both sides of every road."""
        for road in self.roads:
            for side in (-1, 1):
                yield road.strip(0, road.length, side * road.half, side * (road.half + WALKWAY))

    def group(self, road: int) -> int:
        """Which of a signal's two groups a road belongs to."""
        return int(abs(self.roads[road].along[1]) > abs(self.roads[road].along[0]))


def tile_origin(slot: int) -> np.ndarray:
    """(2,) corner of the tile of a map's town `slot`; the tiles fill a square that grows as towns are added."""
    ring = isqrt(slot)
    along = slot - ring * ring
    column, row = (ring, along) if along <= ring else (2 * ring - along, ring)
    return np.array([column, row]) * TILE


def tiles_across(towns: int) -> int:
    """How many tiles wide a map with so many towns is."""
    return isqrt(max(towns, 1) - 1) + 1


@lru_cache(maxsize=4)
def build_town(seed: int, number: int, style: str, slot: int) -> Town:
    """Town `number` of the world of `seed`, of a style of `STYLES`, on tile `slot` of its map."""
    style = STYLES[style]
    rng = np.random.default_rng([seed, 101, number])
    steps = rng.uniform(*style.spacing, (2, NODES - 1))
    grid = np.concatenate([np.zeros((2, 1)), np.cumsum(steps, axis=1)], axis=1)
    grid += MARGIN + 0.5 * (TILE - 2 * MARGIN - grid[:, -1:])
    index = np.array([(i, j) for i in range(NODES) for j in range(NODES)])
    nodes = np.stack([grid[0][index[:, 0]], grid[1][index[:, 1]]], axis=1) + rng.uniform(-7, 7, (NODES**2, 2))
    nodes += tile_origin(slot)
    pairs = _thin([(a, b) for a in range(len(nodes)) for b in range(a) if abs(index[a] - index[b]).sum() == 1], rng)
    wide = rng.random((2, NODES)) < style.wide  # whole streets have two lanes each way
    roads = []
    for b, a in pairs:
        along = nodes[b] - nodes[a]
        length = np.linalg.norm(along)
        along = along / length
        axis = 0 if index[a][1] == index[b][1] else 1
        lanes = 2 if wide[axis, index[a][1 - axis]] else 1
        bay = style.bay if rng.random() < style.bayed else 0.0
        bend = style.bend * rng.uniform(-1, 1) if rng.random() < 0.6 else 0.0
        start = nodes[a] + style.mouth * along
        roads.append(Road((a, b), start, along, length - 2 * style.mouth, lanes, style.lane, bay, bend))
    lanes = [
        Lane(number, direction, i, road.line(0, road.length, -direction * (i + 0.5) * road.lane)[::direction])
        for number, road in enumerate(roads)
        for direction in (1, -1)
        for i in range(road.lanes)
    ]
    connectors = _connect(roads, lanes)
    junctions, signals = [], {}
    for node in range(len(nodes)):
        meeting = [road for road in roads if node in road.nodes]
        junctions.append(_junction(node, meeting, roads, lanes, connectors))
        if rng.random() < style.signals and len(meeting) > 2:
            signals[node] = Signal(rng.uniform(0, 24))
    return Town(style, nodes, roads, junctions, lanes, connectors, signals)


def _junction(node, meeting, roads, lanes, connectors):
    """The hull of the mouths of a junction's roads and of the ways through it."""
    points = [  # a little inside the roads, so that their union has no slits
        road.point(np.full(2, 0.2 if node == road.nodes[0] else road.length - 0.2), np.array([-1, 1]) * road.half)
        for road in meeting
    ]
    for connector in connectors:
        source = lanes[connector.source]
        if roads[source.road].nodes[1 if source.direction > 0 else 0] == node:
            way, aside = Path(connector.points), roads[source.road].lane / 2 + 0.2
            points += [way.shifted(aside).points[1:-1], way.shifted(-aside).points[1:-1]]
    return shapely.get_coordinates(shapely.convex_hull(shapely.linestrings(np.concatenate(points))))[:-1]


def _thin(pairs, rng):
    """Leaves out three roads, so that there are junctions of three; no junction keeps fewer than two."""
    degree = np.bincount(np.array(pairs).ravel())
    kept = list(pairs)
    for k in rng.permutation(len(pairs)):
        ends = list(pairs[k])
        if degree[ends].min() > 2 and len(kept) > len(pairs) - 3:
            kept.remove(pairs[k])
            degree[ends] -= 1
    return kept


def _connect(roads, lanes):
    connectors = []
    for source, lane in enumerate(lanes):
        road = roads[lane.road]
        node = road.nodes[1 if lane.direction > 0 else 0]
        out = [
            (target, other, _turn(road, lane, roads[other.road], other))
            for target, other in enumerate(lanes)
            if other.road != lane.road and node == roads[other.road].nodes[0 if other.direction > 0 else 1]
        ]
        chosen = [entry for entry in out if _may_take(lane, road, entry[1], roads[entry[1].road], entry[2])]
        # An inner lane whose only ways on are right turns still has to lead somewhere.
        chosen = chosen or [entry for entry in out if entry[1].index == min(lane.index, roads[entry[1].road].lanes - 1)]
        for target, other, turn in chosen:
            headings = _direction(road, lane), _direction(roads[other.road], other)
            points = bezier(lane.points[-1], headings[0], other.points[0], headings[1])
            lane.following.append(len(connectors))
            connectors.append(Connector(source, target, turn, points))
    return connectors


def _direction(road, lane):
    """Heading of a lane at both of its ends, where no road is bent."""
    return road.heading() + (0 if lane.direction > 0 else np.pi)


def _turn(road, lane, other_road, other):
    turn = (_direction(other_road, other) - _direction(road, lane) + np.pi) % (2 * np.pi) - np.pi
    return "left" if turn > 0.7 else "right" if turn < -0.7 else "ahead"


def _may_take(lane, road, other, other_road, turn) -> bool:
    return {
        "left": lane.index == 0 and other.index == 0,
        "right": lane.index == road.lanes - 1 and other.index == other_road.lanes - 1,
        "ahead": other.index == min(lane.index, other_road.lanes - 1),
    }[turn]


@dataclass
class Gate:
    """A junction on a route, as arc lengths along it."""

    connector: int
    end: float  # of the lane before it
    clear: float  # start of the lane after it


@dataclass
class Route:
    path: Path  # points half a metre apart
    gates: list[Gate]
    lanes: list[int]


def find_route(town: Town, rng, first_lane: int, length: float, turns=(1.0, 1.0, 1.0), aside: float = 0.0) -> Route:
    """A way through a town of at least `length` metres from the start of a lane.

    Args:
        turns: how likely it is to turn left, to turn right and to go ahead, where there is a choice.
        aside: metres it keeps to the left of the lanes' middles.
    """
    weight = dict(zip(("left", "right", "ahead"), turns))
    lane, lanes, taken = town.lanes[first_lane], [first_lane], []
    pieces = [_beside(lane.points, aside)]
    total = Path(pieces[0]).length
    while total < length and lane.following:
        chances = np.array([weight[town.connectors[number].turn] for number in lane.following])
        number = lane.following[rng.choice(len(chances), p=chances / chances.sum())]
        lane = town.lanes[town.connectors[number].target]
        taken.append(number)
        lanes.append(town.connectors[number].target)
        pieces += [_beside(town.connectors[number].points, aside), _beside(lane.points, aside)]
        total += sum(Path(points).length for points in pieces[-2:])
    points = np.concatenate(pieces)
    arc = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    ends = arc[np.cumsum([len(piece) for piece in pieces]) - 1]
    gates = [Gate(number, ends[2 * k], ends[2 * k + 1]) for k, number in enumerate(taken)]
    return Route(Path(points).resampled(SPACING), gates, lanes)


def _beside(points, aside):
    path = Path(points).resampled(SPACING)
    return path.shifted(aside).points if aside else path.points
