"""The map of a generated place in nuScenes' formats: the map expansion (schema 1.3) and the mask."""

import numpy as np
from PIL import Image, ImageDraw

from .fixtures import lamp_heights
from .paths import Path
from .scene import Scene
from .scenery import post_place, post_s
from .town import TILE, tiles_across

LAYERS = (
    "road_segment", "road_block", "lane", "lane_connector", "ped_crossing", "walkway", "stop_line", "carpark_area",
    "traffic_light", "road_divider", "lane_divider", "drivable_area", "arcline_path_3", "connectivity",
    "polygon", "line", "node",
)  # fmt: skip


def map_expansion(scenes: list[Scene], token) -> dict:
    """The JSON that `NuScenesMap` opens.

    Args:
        scenes: those whose towns lie on this map.
        token: function of (kind, key) that makes tokens.
    """
    layers = {name: {} if name in ("arcline_path_3", "connectivity") else [] for name in LAYERS}
    for scene in scenes:
        _TownLayers(scene, token, layers).add()
    side = tiles_across(len(scenes)) * TILE
    return {"version": "1.3", "canvas_edge": [side, side], **layers}


class _TownLayers:
    """Adds one town to the layers of a map."""

    def __init__(self, scene, token, layers):
        self.town, self.markings, self.layers = scene.town, scene.markings, layers
        self._token, self._index = token, scene.index

    def token(self, kind, key):
        return self._token(kind, (self._index, key))

    def add(self):
        self._segments()
        self._lanes()
        self._connectors()
        self._road_blocks()
        for polygon in self.town.walkways():
            self.row("walkway", polygon_token=self.polygon(polygon))
        self._crossings()
        self._carparks()
        self._dividers()
        self._traffic_lights()

    def row(self, layer, key=None, **fields) -> str:
        """Adds a row; its token is of `key`, or of its number."""
        name = self.token(layer, len(self.layers[layer]) if key is None else key)
        self.layers[layer].append({"token": name, **fields})
        return name

    def nodes(self, points):
        first = len(self.layers["node"])
        rows = self.layers["node"]
        for x, y in np.asarray(points).round(4).tolist():
            rows.append({"token": self.token("node", len(rows)), "x": x, "y": y})
        return [row["token"] for row in rows[first:]]

    def polygon(self, points) -> str:
        return self.row("polygon", exterior_node_tokens=self.nodes(points), holes=[])

    def line(self, points) -> str:
        return self.row("line", node_tokens=self.nodes(points))

    def _segments(self):
        roads = [road.strip(0, road.length, -road.half, road.half) for road in self.town.roads]
        area, polygons = self.token("drivable_area", 0), []
        for i, points in enumerate(roads + self.town.junctions):
            polygons.append(self.polygon(points))
            fields = dict(polygon_token=polygons[-1], is_intersection=i >= len(roads), drivable_area_token=area)
            self.row("road_segment", i, **fields)
        self.row("drivable_area", 0, polygon_tokens=polygons)

    def _lanes(self):
        roads = self.town.roads
        for i, lane in enumerate(self.town.lanes):
            road, way = roads[lane.road], lane.direction
            inner, outer = (-way * (lane.index + k) * road.lane for k in (0, 1))
            left, right = (road.line(0, road.length, t)[::way] for t in (inner, outer))
            name = self.row(
                "lane",
                i,
                polygon_token=self.polygon(np.concatenate([left, right[::-1]])),
                lane_type="CAR",
                from_edge_line_token=self.line([left[0], right[0]]),
                to_edge_line_token=self.line([left[-1], right[-1]]),
                left_lane_divider_segments=self._segment_rows(lane.road, inner, left),
                right_lane_divider_segments=self._segment_rows(lane.road, outer, right),
            )
            self.layers["arcline_path_3"][name] = _arc_lines(lane.points)
            self.layers["connectivity"][name] = {"incoming": [], "outgoing": []}

    def _segment_rows(self, road, t, points):
        line = next(line for line in self.markings.lines if line.road == road and abs(line.t - t) < 1e-6)
        return [{"node_token": node, "segment_type": line.segment_type} for node in self.nodes(points)]

    def _connectors(self):
        arcs, connectivity = self.layers["arcline_path_3"], self.layers["connectivity"]
        for i, connector in enumerate(self.town.connectors):
            points = connector.points[np.linspace(0, len(connector.points) - 1, 12).astype(int)]
            path = Path(points)
            band = np.concatenate([path.shifted(-1.5).points, path.shifted(1.5).points[::-1]])
            name = self.row("lane_connector", i, polygon_token=self.polygon(band))
            source, target = self.token("lane", connector.source), self.token("lane", connector.target)
            arcs[name] = _arc_lines(points)
            connectivity[name] = {"incoming": [source], "outgoing": [target]}
            connectivity[source]["outgoing"].append(name)
            connectivity[target]["incoming"].append(name)

    def _road_blocks(self):
        for i, road in enumerate(self.town.roads):
            for side in (-1, 1):
                ends, t = (0, road.length)[::-side], sorted((0.0, side * road.half))
                self.row(
                    "road_block",
                    (i, side),
                    polygon_token=self.polygon(road.strip(0, road.length, *t)),
                    from_edge_line_token=self.line(road.point(np.full(2, float(ends[0])), np.array(t))),
                    to_edge_line_token=self.line(road.point(np.full(2, float(ends[1])), np.array(t))),
                    road_segment_token=self.token("road_segment", i),
                )

    def _crossings(self):
        roads = self.town.roads
        for road, end, s0, s1 in self.town.crossings():
            polygon = self.polygon(roads[road].strip(s0, s1, -roads[road].half, roads[road].half))
            segment = self.token("road_segment", road)
            self.row("ped_crossing", (road, end), polygon_token=polygon, road_segment_token=segment)
        for road, end, *extent in self.markings.stops:
            self.row(
                "stop_line",
                (road, end),
                polygon_token=self.polygon(roads[road].strip(*extent)),
                stop_line_type="PED_CROSSING",
                ped_crossing_tokens=[self.token("ped_crossing", (road, end))],
                traffic_light_tokens=[],
                road_block_token=self.token("road_block", (road, 1 if end == 0 else -1)),
            )

    def _carparks(self):
        """One area for each row of parking slots."""
        for number, road in enumerate(self.town.roads):
            for side in (-1, 1):
                slots = [slot for slot in self.markings.slots if slot.road == number and slot.side == side]
                if slots:
                    polygon = road.strip(slots[0].s0, slots[-1].s1, side * road.edge, side * (road.half - 0.3))
                    self.row(
                        "carpark_area",
                        polygon_token=self.polygon(polygon),
                        orientation=float(road.heading(road.length / 2)),
                        road_block_token=self.token("road_block", (number, side)),
                    )

    def _dividers(self):
        """The painted lines: those between directions, and those along the lanes' sides."""
        for line in self.markings.lines:
            road = self.town.roads[line.road]
            name = self.line(road.line(line.s0, line.s1, line.t))
            if line.role == "middle":
                self.row("road_divider", line_token=name, road_segment_token=self.token("road_segment", line.road))
            else:
                kind = line.segment_type
                nodes = self.layers["line"][-1]["node_tokens"]
                rows = [{"node_token": node, "segment_type": kind} for node in nodes]
                self.row("lane_divider", line_token=name, lane_divider_segments=rows)

    def _traffic_lights(self):
        roads = self.town.roads
        for number, road in enumerate(roads):
            for end, node in enumerate(road.nodes):
                if node in self.town.signals:
                    self._traffic_light(number, road, end)

    def _traffic_light(self, number, road, end):
        side = 1 if end == 0 else -1
        point = post_place(road, end)
        across = road.point(np.full(2, post_s(road, end)), side * (road.half + np.array([0.4, 0.8])))
        yaw = float(road.heading()) + (0 if end == 0 else np.pi)
        pose = {"tx": float(point[0]), "ty": float(point[1]), "tz": 0.0, "rx": 0.0, "ry": 0.0, "rz": yaw}
        light = self.row(
            "traffic_light",
            (number, end),
            line_token=self.line(across),
            traffic_light_type="VERTICAL",
            from_road_block_token=self.token("road_block", (number, side)),
            items=[
                {"color": name.upper(), "shape": "CIRCLE", "rel_pos": {"tx": 0.15, "ty": 0.0, "tz": height}}
                for name, height in lamp_heights().items()
            ],
            pose=pose,
        )
        stop = next(row for row in self.layers["stop_line"] if row["token"] == self.token("stop_line", (number, end)))
        stop["traffic_light_tokens"].append(light)
        stop["stop_line_type"] = "TRAFFIC_LIGHT"


def _arc_lines(points):
    """The polyline as straight pieces of nuScenes' arc-line paths."""
    pieces = []
    for a, b in zip(points[:-1], points[1:]):
        side = b - a
        heading, length = float(np.arctan2(side[1], side[0])), float(np.hypot(*side))
        pieces.append(
            {
                "start_pose": [*a.tolist(), heading],
                "end_pose": [*b.tolist(), heading],
                "shape": "LSR",
                "radius": 999.999,
                "segment_length": [0.0, length, 0.0],
            }
        )
    return pieces


def map_mask(scenes: list[Scene]) -> Image.Image:
    """The mask of drivable surface and walkways: 255 inside, 0.1 m a pixel, north up."""
    side = round(tiles_across(len(scenes)) * TILE * 10)
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for town in (scene.town for scene in scenes):
        polygons = [road.strip(0, road.length, -road.half, road.half) for road in town.roads]
        for polygon in polygons + town.junctions + list(town.walkways()):
            corners = np.asarray(polygon) * 10
            draw.polygon([(x, side - y) for x, y in corners.tolist()], fill=255)
    return image
