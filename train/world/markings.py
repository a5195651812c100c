"""What is painted on the roads of a town: lines of nine types, signs, crossings, stop lines, parking slots, bumps.

Each mark is recorded once, in road coordinates; the paint that is rendered, the map expansion and
`maps/markings/<location>.json` all follow from that record.
"""

from dataclasses import dataclass, field

import numpy as np

from .town import Road, Town

# Sub-lines of each type, from left to right along the line: metres to its left, width, (painted, gap) or None.
NARROW, TWIN, BROAD, DASH = 0.15, 0.14, 0.35, (3.0, 4.5)
LINE_TYPES = {
    "SolidLine": ((0.0, NARROW, None),),
    "DoubleSolidLine": ((0.17, TWIN, None), (-0.17, TWIN, None)),
    "DashedLine": ((0.0, NARROW, DASH),),
    "DoubleDashedLine": ((0.17, TWIN, DASH), (-0.17, TWIN, DASH)),
    "RightSolidLeftDashed": ((0.17, TWIN, DASH), (-0.17, TWIN, None)),
    "LeftSolidRightDashed": ((0.17, TWIN, None), (-0.17, TWIN, DASH)),
    "WideSolidLine": ((0.0, BROAD, None),),
    "WideDashedLine": ((0.0, BROAD, (3.0, 3.0)),),
    "ShortDashedLine": ((0.0, NARROW, (1.0, 1.0)),),
}
MIDDLE = (
    "DoubleSolidLine", "DashedLine", "SolidLine", "RightSolidLeftDashed", "DoubleDashedLine", "LeftSolidRightDashed",
)  # fmt: skip
BETWEEN = ("DashedLine", "ShortDashedLine", "WideDashedLine", "SolidLine")
EDGE = ("SolidLine", "WideSolidLine", "ShortDashedLine", "SolidLine", "WideDashedLine")
# nuScenes' words for the lines it knows; everything else is NIL there.
SEGMENT_TYPES = {
    ("SolidLine", "white"): "SINGLE_SOLID_WHITE",
    ("SolidLine", "yellow"): "SINGLE_SOLID_YELLOW",
    ("DoubleSolidLine", "white"): "DOUBLE_SOLID_WHITE",
    ("DoubleDashedLine", "white"): "DOUBLE_DASHED_WHITE",
}
STOP = (5.4, 5.8)  # metres from the end of a road to its stop line
BARE = 6.2  # metres at both ends of a road without lines along it


@dataclass(frozen=True)
class Line:
    """A line along a road from `s0` to `s1` at `t`; where `s0 > s1` it runs, and is seen, against the road."""

    road: int
    kind: str
    colour: str
    role: str  # middle, between (lanes of one direction) or edge
    s0: float
    s1: float
    t: float

    @property
    def segment_type(self) -> str:
        """nuScenes' word for the line, NIL where it has none."""
        return SEGMENT_TYPES.get((self.kind, self.colour), "NIL")

    def pieces(self):
        """(metres to the left, width, [(from, to), …]) of each sub-line, in metres of s from the start of the line."""
        length = abs(self.s1 - self.s0)
        for left, width, dash in LINE_TYPES[self.kind]:
            if dash is None:
                yield left, width, [(0.0, length)]
            else:
                starts = np.arange(0, length - dash[0] + 1e-6, sum(dash))
                yield left, width, [(float(start), float(start + dash[0])) for start in starts]


@dataclass(frozen=True)
class Sign:
    """An arrow or a diamond on a lane."""

    road: int
    kind: str
    s: float
    t: float
    direction: int

    def shapes(self, road: Road):
        """Its painted polygons, (N, 2) in its own frame, x ahead, and in the world."""
        heading = self.heading(road)
        turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
        shapes = sign_shapes(self.kind)
        middle = road.point(self.s, self.t)
        return shapes, [middle + np.array(shape) @ turn.T for shape in shapes]

    def heading(self, road: Road) -> float:
        return float(road.heading(self.s)) + (0 if self.direction > 0 else np.pi)


@dataclass(frozen=True)
class Bump:
    """A speed bump across all lanes of a road."""

    road: int
    s: float
    length: float  # along the road
    height: float


@dataclass(frozen=True)
class Slot:
    """A parking slot between the outer lane and the kerb."""

    road: int
    side: int  # +1 left of the road, -1 right
    s0: float
    s1: float


@dataclass
class Markings:
    lines: list[Line] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)
    bumps: list[Bump] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    stops: list[tuple[int, int, float, float, float, float]] = field(default_factory=list)  # road, end, s0, s1, t0, t1
    slot_lines: list[tuple[int, float, float, float, float]] = field(default_factory=list)  # road, s0, s1, t0, t1


def sign_shapes(kind: str) -> list:
    """Painted polygons of a sign, x ahead and y left, the middle of the box round them at 0."""
    if kind == "diamond":
        return [[(-1.25, 0.0), (0.0, -0.55), (1.25, 0.0), (0.0, 0.55)]]
    shapes = [[(-1.8, -0.09), (0.6, -0.09), (0.6, 0.09), (-1.8, 0.09)]]
    if "ahead" in kind:
        shapes.append([(0.6, -0.4), (1.9, 0.0), (0.6, 0.4)])
    for name, side in (("left", 1), ("right", -1)):
        if name in kind:
            bar = [(0.42, 0.0), (0.6, 0.0), (0.6, 0.7), (0.42, 0.7)]
            shapes += [[(x, side * y) for x, y in shape] for shape in (bar, [(0.1, 0.65), (0.92, 0.65), (0.51, 1.3)])]
    points = np.concatenate([np.array(shape) for shape in shapes])
    middle = (points.min(0) + points.max(0)) / 2
    return [(np.array(shape) - middle).tolist() for shape in shapes]


def mark(town: Town, rng) -> Markings:
    """Decides what is painted on every road. The types of lines are dealt out in turn, so that a town has all nine."""
    result = Markings()
    first = rng.integers(0, 60, 3)
    wide = 0
    for number, road in enumerate(town.roads):
        if rng.random() < town.style.bumps:
            where = road.length * rng.uniform(0.35, 0.65)
            result.bumps.append(Bump(number, float(where), rng.uniform(0.6, 0.9), rng.uniform(0.06, 0.09)))
        ends = [BARE, road.length - BARE]
        for bump in result.bumps:
            if bump.road == number:
                ends[1:1] = [bump.s - 0.5 * bump.length - 0.6, bump.s + 0.5 * bump.length + 0.6]
        colour = "yellow" if rng.random() < 0.6 else "white"
        kinds = {"middle": MIDDLE[(first[0] + number) % len(MIDDLE)], "edge": EDGE[(first[2] + number) % len(EDGE)]}
        if road.lanes > 1:
            kinds["between"] = BETWEEN[(first[1] + wide) % len(BETWEEN)]
            wide += 1
        for s0, s1 in zip(ends[::2], ends[1::2]):
            result.lines.append(Line(number, kinds["middle"], colour, "middle", s0, s1, 0.0))
            for side in (-1, 1):  # lines run with the traffic beside them
                way = (s0, s1) if side < 0 else (s1, s0)
                for i in range(1, road.lanes + 1):
                    role = "edge" if i == road.lanes else "between"
                    result.lines.append(Line(number, kinds[role], "white", role, *way, side * i * road.lane))
        _mark_ends(result, town, number, road, rng)
        if road.bay:
            _mark_slots(result, town, number, road)
    return result


def _mark_ends(result, town, number, road, rng):
    """Stop lines, an arrow on each lane that says where it leads, and a diamond ahead of some crossings."""
    for lane in (lane for lane in town.lanes if lane.road == number):
        turns = sorted({town.connectors[c].turn for c in lane.following})
        kind = "arrow_" + "_".join(turns) if turns else "diamond"
        t = -lane.direction * (lane.index + 0.5) * road.lane
        for back, what in ((13.0, kind), (21.0, "diamond")):
            s = road.length - back if lane.direction > 0 else back
            taken = any(bump.road == number and abs(bump.s - s) < 3.5 for bump in result.bumps)
            if not taken and (what != "diamond" or rng.random() < 0.3):
                result.signs.append(Sign(number, what, float(s), float(t), lane.direction))
    for end, side in ((0, 1), (1, -1)):
        s = STOP if end == 0 else (road.length - STOP[1], road.length - STOP[0])
        result.stops.append((number, end, *s, *sorted((side * 0.3, side * (road.edge - 0.2)))))


def _mark_slots(result, town, number, road):
    start, end = BARE + 2, road.length - BARE - 2
    count = int((end - start) / town.style.slot)
    start += 0.5 * (end - start - count * town.style.slot)
    edges = start + town.style.slot * np.arange(count + 1)
    for side in (-1, 1):
        result.slots += [Slot(number, side, float(a), float(b)) for a, b in zip(edges[:-1], edges[1:])]
        bay = sorted((side * road.edge, side * (road.half - 0.3)))
        result.slot_lines += [(number, float(s - 0.06), float(s + 0.06), *bay) for s in edges]


def bump_bands(road: Road, bump: Bump):
    """The two painted bands along the sides of a speed bump."""
    heading = road.heading(bump.s)
    ahead = np.array([np.cos(heading), np.sin(heading)])
    across = np.array([-ahead[1], ahead[0]]) * road.edge
    for side in (-1, 1):
        near, far = (side * (0.5 * bump.length + reach) * ahead for reach in (0.08, 0.32))
        yield road.point(bump.s, 0.0) + [near - across, far - across, far + across, near + across]


def crossing_stripes(road: Road, s0: float, s1: float):
    """(s0, s1, t0, t1) of the bars of a pedestrian crossing."""
    return [(s0, s1, float(t), float(t + 0.5)) for t in np.arange(-road.half + 0.4, road.half - 0.6, 1.0)]


def line_paint(road: Road, line: Line):
    """Painted polygons of a line."""
    way = 1 if line.s1 > line.s0 else -1
    for left, width, pieces in line.pieces():
        t = line.t + way * left
        for start, end in pieces:
            yield road.strip(*sorted((line.s0 + way * start, line.s0 + way * end)), t - width / 2, t + width / 2)


def paint_of(town: Town, markings: Markings) -> list[tuple[str, np.ndarray, bool]]:
    """What is painted on the ground, in order: lawns, kerbs, asphalt, then the markings."""
    paint = []
    for corners in _blocks(town):
        middle = corners.mean(0)
        paint.append(("lawn", middle + (corners - middle) * 0.62, True))
    for road in town.roads:
        edge = road.half + 0.32
        paint.append(("white", road.strip(-1, road.length + 1, -edge, edge), True))
    for polygon in town.junctions:
        middle = polygon.mean(0)
        reach = np.linalg.norm(polygon - middle, axis=1, keepdims=True)
        paint.append(("white", middle + (polygon - middle) * (1 + 0.45 / reach), True))
    surfaces = [road.strip(0, road.length, -road.half, road.half) for road in town.roads] + town.junctions
    paint += [("white", polygon, False) for polygon in surfaces] + [("road", polygon, True) for polygon in surfaces]
    roads = town.roads
    paint += [(line.colour, shape, True) for line in markings.lines for shape in line_paint(roads[line.road], line)]
    paint += [("white", roads[road].strip(*extent), True) for road, *extent in markings.slot_lines]
    paint += [("white", roads[road].strip(*extent), True) for road, _, *extent in markings.stops]
    for road, _, s0, s1 in town.crossings():
        paint += [("white", roads[road].strip(*extent), True) for extent in crossing_stripes(roads[road], s0, s1)]
    for sign in markings.signs:
        paint += [("white", shape, True) for shape in sign.shapes(roads[sign.road])[1]]
    for bump in markings.bumps:
        paint += [("yellow", band, True) for band in bump_bands(roads[bump.road], bump)]
    return paint


def _blocks(town):
    """(4, 2) the junctions round each block."""
    side = round(np.sqrt(len(town.nodes)))
    for i in range(side - 1):
        for j in range(side - 1):
            yield town.nodes[[i * side + j, (i + 1) * side + j, (i + 1) * side + j + 1, i * side + j + 1]]
