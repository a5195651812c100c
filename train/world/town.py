"""A generated town: streets with lanes, markings and crossings, houses, trees. All of it follows from one seed."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..data.poses import rotation_z
from .casting import Placed
from .paths import Path, bezier
from .shading import convex_hull
from .shapes import billboard, building, lamp_post, tree

LANE, PARKING, WALKWAY, MOUTH = 3.5, 2.6, 3.0, 15.0  # metres; a road ends MOUTH before the middle of its junction
NODES, SPACING, MARGIN = 5, 92.0, 80.0
EDGE = 2 * MARGIN + (NODES - 1) * SPACING  # the sides of the map


@dataclass
class Lane:
    road: int
    direction: int  # +1 with the road, -1 against it
    index: int  # 0 is next to the middle
    points: np.ndarray  # (2, 2)
    following: list[int] = field(default_factory=list)  # connectors that start at its end


@dataclass
class Connector:
    source: int
    target: int
    points: np.ndarray  # (N, 2)


@dataclass
class Road:
    """A straight street between two junctions, in its own coordinates: s along it, t to the left."""

    nodes: tuple[int, int]
    start: np.ndarray
    along: np.ndarray  # unit
    length: float
    lanes: int  # each way

    @property
    def half(self) -> float:
        return self.lanes * LANE + PARKING

    @property
    def heading(self) -> float:
        return float(np.arctan2(self.along[1], self.along[0]))

    def point(self, s, t) -> np.ndarray:
        """(..., 2) world coordinates."""
        left = np.array([-self.along[1], self.along[0]])
        return self.start + np.multiply.outer(s, self.along) + np.multiply.outer(t, left)

    def rectangle(self, s0, s1, t0, t1) -> np.ndarray:
        """(4, 2) corners."""
        return self.point(np.array([s0, s1, s1, s0]), np.array([t0, t0, t1, t1]))


@dataclass
class Town:
    roads: list[Road]
    junctions: list[np.ndarray]  # polygons
    lanes: list[Lane]
    connectors: list[Connector]
    paint: list[tuple[str, np.ndarray, bool]]
    scenery: list[Placed]

    def crossings(self):
        """(road, polygon (4, 2)) of each pedestrian crossing."""
        for number, road in enumerate(self.roads):
            for s in (0.6, road.length - 4.6):
                yield number, road.rectangle(s, s + 4.0, -road.half, road.half)

    def walkways(self):
        for number, road in enumerate(self.roads):
            for side in (-1, 1):
                yield number, road.rectangle(0, road.length, side * road.half, side * (road.half + WALKWAY))

    def walk(self, rng, first_lane: int, length: float) -> tuple[Path, list[int]]:
        """A route of at least `length` metres, turning at random, and the roads it takes."""
        lane, points, roads = self.lanes[first_lane], [self.lanes[first_lane].points], [self.lanes[first_lane].road]
        while Path(np.concatenate(points)).length < length and lane.following:
            connector = self.connectors[lane.following[rng.integers(len(lane.following))]]
            lane = self.lanes[connector.target]
            points += [connector.points, lane.points]
            roads.append(lane.road)
        return Path(_resample(np.concatenate(points))), roads


def _resample(points, spacing=0.5):
    path = Path(points)
    return path.at(np.linspace(0, path.length, max(int(path.length / spacing), 2)))[:, :2]


@lru_cache(maxsize=4)
def build_town(seed: int, number: int) -> Town:
    """Town `number` of the world of `seed`."""
    rng = np.random.default_rng([seed, 101, number])
    index = np.array([(i, j) for i in range(NODES) for j in range(NODES)])
    nodes = MARGIN + SPACING * index + rng.uniform(-9, 9, (NODES**2, 2))
    pairs = [(a, b) for a in range(len(nodes)) for b in range(a + 1, len(nodes)) if abs(index[a] - index[b]).sum() == 1]
    wide = rng.random((2, NODES)) < 0.45  # whole streets have two lanes each way
    roads = []
    for a, b in pairs:
        along = nodes[b] - nodes[a]
        length = np.linalg.norm(along)
        along = along / length
        axis = 0 if index[a][1] == index[b][1] else 1
        lanes = 2 if wide[axis, index[a][1 - axis]] else 1
        roads.append(Road((a, b), nodes[a] + MOUTH * along, along, length - 2 * MOUTH, lanes))
    lanes = [
        Lane(number, direction, i, _lane_line(road, direction, i))
        for number, road in enumerate(roads)
        for direction in (1, -1)
        for i in range(road.lanes)
    ]
    connectors = _connect(roads, lanes)
    junctions = []
    for node in range(len(nodes)):
        mouths = [
            road.point(np.zeros(2) if node == road.nodes[0] else np.full(2, road.length), np.array([-1, 1]) * road.half)
            for road in roads
            if node in road.nodes
        ]
        junctions.append(convex_hull(np.concatenate(mouths)))
    town = Town(roads, junctions, lanes, connectors, [], [])
    parks = rng.random((NODES - 1, NODES - 1)) < 0.25
    town.paint = _paint(town, nodes, rng)
    town.scenery = _scenery(town, nodes, parks, rng)
    return town


def _lane_line(road, direction, i):
    points = road.point(np.array([0.0, road.length]), np.full(2, -direction * (i + 0.5) * LANE))
    return points[::direction]


def _connect(roads, lanes):
    connectors = []
    for source, lane in enumerate(lanes):
        node = roads[lane.road].nodes[1 if lane.direction > 0 else 0]
        heading = roads[lane.road].heading + (0 if lane.direction > 0 else np.pi)
        for target, other in enumerate(lanes):
            road = roads[other.road]
            if other.road == lane.road or node != road.nodes[0 if other.direction > 0 else 1]:
                continue
            out = road.heading + (0 if other.direction > 0 else np.pi)
            turn = (out - heading + np.pi) % (2 * np.pi) - np.pi
            width = roads[lane.road].lanes
            allowed = {
                "left": lane.index == 0 and other.index == 0,
                "right": lane.index == width - 1 and other.index == road.lanes - 1,
                "ahead": other.index == min(lane.index, road.lanes - 1),
            }["left" if turn > 0.7 else "right" if turn < -0.7 else "ahead"]
            if allowed:
                lane.following.append(len(connectors))
                points = bezier(lane.points[1], heading, other.points[0], out)
                connectors.append(Connector(source, target, points))
    return connectors


def _paint(town, nodes, rng):
    """What is painted on the ground, in order: lawns, kerbs, asphalt, then the markings."""
    paint = []
    for i in range(NODES - 1):
        for j in range(NODES - 1):
            corners = nodes[[i * NODES + j, (i + 1) * NODES + j, (i + 1) * NODES + j + 1, i * NODES + j + 1]]
            middle = corners.mean(0)
            paint.append(("lawn", middle + (corners - middle) * 0.62, True))
    for road in town.roads:
        edge = road.half + 0.32
        paint.append(("white", road.rectangle(-1, road.length + 1, -edge, edge), True))
    for polygon in town.junctions:
        middle = polygon.mean(0)
        reach = np.linalg.norm(polygon - middle, axis=1, keepdims=True)
        paint.append(("white", middle + (polygon - middle) * (1 + 0.45 / reach), True))
    surfaces = [road.rectangle(0, road.length, -road.half, road.half) for road in town.roads] + town.junctions
    paint += [("white", polygon, False) for polygon in surfaces] + [("road", polygon, True) for polygon in surfaces]
    for road in town.roads:
        paint += _markings(road, rng)
    return paint


def _markings(road: Road, rng):
    start, end = 6.2, road.length - 6.2
    marks = [("yellow", (start, end, side * 0.18 - 0.07, side * 0.18 + 0.07)) for side in (-1, 1)]
    for side in (-1, 1):
        for i in range(1, road.lanes):
            marks += [("white", (s, s + 3.0, side * i * LANE - 0.08, side * i * LANE + 0.08))
                      for s in np.arange(start, end - 3, 7.5)]  # fmt: skip
        strip = side * road.lanes * LANE
        marks.append(("white", (start + 2, end - 2, strip - 0.06, strip + 0.06)))
        bay = sorted((strip, side * (road.half - 0.3)))
        marks += [("white", (s, s + 0.12, *bay)) for s in np.arange(start + 2, end - 2, 6.2)]
        stop = (5.4, 5.8) if side > 0 else (road.length - 5.8, road.length - 5.4)
        marks.append(("white", (*stop, *sorted((side * 0.3, side * road.lanes * LANE)))))
    for s in (0.6, road.length - 4.6):
        marks += [("white", (s, s + 4.0, t, t + 0.5)) for t in np.arange(-road.half + 0.4, road.half - 0.6, 1.0)]
    polygons = [(channel, road.rectangle(*extent), True) for channel, extent in marks]
    for side in (-1, 1):  # arrows before the stop lines
        for i in range(road.lanes):
            s = 15.0 if side > 0 else road.length - 15.0
            polygons += _arrow(road, s, side * (i + 0.5) * LANE, -side, rng.integers(3))
    return polygons


def _arrow(road, s, t, direction, kind):
    """An arrow on the lane: ahead, left or right."""
    shaft = [(-1.8, -0.09), (0.6, -0.09), (0.6, 0.09), (-1.8, 0.09)]
    heads = {
        0: [[(0.6, -0.4), (1.9, 0.0), (0.6, 0.4)]],
        1: [[(0.42, 0.0), (0.6, 0.0), (0.6, 0.7), (0.42, 0.7)], [(0.1, 0.65), (0.92, 0.65), (0.51, 1.3)]],
        2: [[(0.42, -0.7), (0.6, -0.7), (0.6, 0.0), (0.42, 0.0)], [(0.1, -0.65), (0.92, -0.65), (0.51, -1.3)]],
    }
    shapes = [shaft, *heads[int(kind)]]
    return [
        ("white", road.point(s + direction * np.array(shape)[:, 0], t + direction * np.array(shape)[:, 1]), True)
        for shape in shapes
    ]


def _scenery(town, nodes, parks, rng):
    scenery = []
    for road in town.roads:
        for side in (-1, 1):
            scenery += _frontage(town, road, side, _is_park(road, side, parks), rng)
            for s in np.arange(8 + rng.uniform(0, 4), road.length - 8, 13.0):
                x, y = road.point(s, side * (road.half + 0.9))
                if rng.random() < 0.6:
                    body = tree(rng.uniform(5.5, 8.5), int(rng.integers(2**31)))
                    turn = rotation_z(rng.uniform(0, 6.3))
                else:
                    body = lamp_post(rng.uniform(6.5, 8), int(rng.integers(2**31)))
                    turn = rotation_z(road.heading - side * np.pi / 2)
                scenery.append(Placed(body, turn, np.array([x, y, body.size[2] / 2]), seed=int(rng.integers(2**20))))
    return scenery


def _is_park(road, side, parks):
    """Whether the block on one side of a road is a park."""
    a = np.array(divmod(road.nodes[0], NODES))
    b = np.array(divmod(road.nodes[1], NODES))
    across = np.array([-(b - a)[1], (b - a)[0]]) * side
    i, j = np.floor((a + b + across) / 2).astype(int)
    return bool(0 <= i < NODES - 1 and 0 <= j < NODES - 1 and parks[i, j])


def _frontage(town, road, side, park, rng):
    """Houses along one side of a road, or the trees of a park."""
    placed, s = [], -4.0
    while s < road.length - 4:
        width = rng.uniform(9, 20) if not park else 7.0
        depth = rng.uniform(9, 14)
        height = rng.uniform(7, 15) if rng.random() < 0.75 else rng.uniform(15, 34)
        gap = rng.uniform(0.3, 1.5) if rng.random() < 0.8 else rng.uniform(4, 8)
        seed = int(rng.integers(2**20))
        centre = road.point(s + width / 2, side * (road.half + WALKWAY + rng.uniform(0.6, 2) + depth / 2))
        turn = rotation_z(road.heading - side * np.pi / 2)
        if park:
            offset = rng.uniform(-3, 3, 2)
            body = tree(rng.uniform(7, 11), seed) if rng.random() < 0.8 else billboard(5.0, seed)
            centre = centre + offset
        else:
            body = building(width, depth, height, seed)
        if _is_clear(town, centre, turn, body.size):
            placed.append(Placed(body, turn, np.array([*centre, body.size[2] / 2]), seed=seed))
        s += width + gap
    return placed


def _is_clear(town, centre, turn, size):
    """Whether a footprint keeps off every road and its walkways."""
    grid = np.array([(x, y, 0) for x in (-0.5, 0, 0.5) for y in (-0.5, 0, 0.5)]) * [size[1], size[0], 0]
    points = (grid @ turn.T)[:, :2] + centre
    for road in town.roads:
        offset = points - road.start
        s = np.clip(offset @ road.along, -MOUTH, road.length + MOUTH)
        if (np.linalg.norm(offset - s[:, None] * road.along, axis=1) < road.half + WALKWAY + 0.4).any():
            return False
    return True
