"""The map of a generated town in nuScenes' formats: the map expansion (schema 1.3) and the mask."""

import numpy as np
from PIL import Image, ImageDraw

from .paths import Path
from .town import EDGE, LANE, Town


class _Layers:
    """Collects nodes, polygons and lines under tokens."""

    def __init__(self, token):
        self.token = token
        self.node, self.polygon, self.line = [], [], []

    def add_nodes(self, points):
        first = len(self.node)
        for i, (x, y) in enumerate(np.asarray(points).round(4).tolist()):
            self.node.append({"token": self.token("node", first + i), "x": x, "y": y})
        return [row["token"] for row in self.node[first:]]

    def add_polygon(self, points) -> str:
        row = {"token": self.token("polygon", len(self.polygon)), "exterior_node_tokens": self.add_nodes(points)}
        self.polygon.append({**row, "holes": []})
        return row["token"]

    def add_line(self, points) -> str:
        self.line.append({"token": self.token("line", len(self.line)), "node_tokens": self.add_nodes(points)})
        return self.line[-1]["token"]


def map_expansion(town: Town, token) -> dict:
    """The JSON that `NuScenesMap` opens.

    Args:
        town: what to describe.
        token: function of (kind, key) that makes tokens.
    """
    layers = _Layers(token)
    area = token("drivable_area", 0)
    roads = [road.rectangle(0, road.length, -road.half, road.half) for road in town.roads]
    segments = [
        {
            "token": token("road_segment", i),
            "polygon_token": layers.add_polygon(polygon),
            "is_intersection": i >= len(roads),
            "drivable_area_token": area,
        }
        for i, polygon in enumerate(roads + town.junctions)
    ]
    lanes, arcs = _lanes(town, layers, token)
    connectors, connectivity = _connectors(town, layers, token, arcs)
    crossings = [
        {
            "token": token("ped_crossing", i),
            "polygon_token": layers.add_polygon(polygon),
            "road_segment_token": segments[road]["token"],
        }
        for i, (road, polygon) in enumerate(town.crossings())
    ]
    result = {
        "version": "1.3",
        "canvas_edge": [EDGE, EDGE],
        "drivable_area": [{"token": area, "polygon_tokens": [row["polygon_token"] for row in segments]}],
        "road_segment": segments,
        "road_block": _road_blocks(town, layers, token, segments),
        "lane": lanes,
        "lane_connector": connectors,
        "ped_crossing": crossings,
        "walkway": [
            {"token": token("walkway", i), "polygon_token": layers.add_polygon(polygon)}
            for i, (_, polygon) in enumerate(town.walkways())
        ],
        "stop_line": _stop_lines(town, layers, token, crossings),
        "carpark_area": [],
        "traffic_light": [],
        **_dividers(town, layers, token, segments),
        "arcline_path_3": arcs,
        "connectivity": connectivity,
    }
    return {**result, "node": layers.node, "polygon": layers.polygon, "line": layers.line}


def _lanes(town, layers, token):
    rows, arcs = [], {}
    for i, lane in enumerate(town.lanes):
        sides = [Path(lane.points).shifted(side * LANE / 2).points for side in (1, -1)]
        left, right = (
            [
                {"node_token": node, "segment_type": "DASHED_SEGMENT_WHITE" if inner else "DOUBLE_SOLID_YELLOW"}
                for node in layers.add_nodes(points)
            ]
            for points, inner in ((sides[0], lane.index > 0), (sides[1], True))
        )
        rows.append(
            {
                "token": token("lane", i),
                "polygon_token": layers.add_polygon(np.concatenate([sides[0], sides[1][::-1]])),
                "lane_type": "CAR",
                "from_edge_line_token": layers.add_line([sides[0][0], sides[1][0]]),
                "to_edge_line_token": layers.add_line([sides[0][-1], sides[1][-1]]),
                "left_lane_divider_segments": left,
                "right_lane_divider_segments": right,
            }
        )
        arcs[token("lane", i)] = _arc_lines(lane.points)
    return rows, arcs


def _connectors(town, layers, token, arcs):
    rows = []
    connectivity = {token("lane", i): {"incoming": [], "outgoing": []} for i in range(len(town.lanes))}
    for i, connector in enumerate(town.connectors):
        points = connector.points[np.linspace(0, len(connector.points) - 1, 12).astype(int)]
        path = Path(points)
        band = np.concatenate([path.shifted(1.5).points, path.shifted(-1.5).points[::-1]])
        name = token("lane_connector", i)
        source, target = token("lane", connector.source), token("lane", connector.target)
        rows.append({"token": name, "polygon_token": layers.add_polygon(band)})
        arcs[name] = _arc_lines(points)
        connectivity[name] = {"incoming": [source], "outgoing": [target]}
        connectivity[source]["outgoing"].append(name)
        connectivity[target]["incoming"].append(name)
    return rows, connectivity


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


def _road_blocks(town, layers, token, segments):
    rows = []
    for i, road in enumerate(town.roads):
        for side in (-1, 1):
            ends = (0, road.length)[::-side]
            t = sorted((0.0, side * road.half))
            rows.append(
                {
                    "token": token("road_block", (i, side)),
                    "polygon_token": layers.add_polygon(road.rectangle(0, road.length, *t)),
                    "from_edge_line_token": layers.add_line(road.point(np.full(2, ends[0]), np.array(t))),
                    "to_edge_line_token": layers.add_line(road.point(np.full(2, ends[1]), np.array(t))),
                    "road_segment_token": segments[i]["token"],
                }
            )
    return rows


def _stop_lines(town, layers, token, crossings):
    rows = []
    for i, road in enumerate(town.roads):
        for end, side in ((0, 1), (1, -1)):
            s = (4.8, 6.4) if end == 0 else (road.length - 6.4, road.length - 4.8)
            polygon = road.rectangle(*s, *sorted((0.0, side * road.lanes * LANE)))
            rows.append(
                {
                    "token": token("stop_line", (i, end)),
                    "polygon_token": layers.add_polygon(polygon),
                    "stop_line_type": "PED_CROSSING",
                    "ped_crossing_tokens": [crossings[2 * i + end]["token"]],
                    "traffic_light_tokens": [],
                    "road_block_token": token("road_block", (i, -side)),
                }
            )
    return rows


def _dividers(town, layers, token, segments):
    """The middle of each road, and the lines between its lanes and along its parking strips."""
    middle, between = [], []
    for i, road in enumerate(town.roads):
        ends = np.array([0.0, road.length])
        middle.append(
            {
                "token": token("road_divider", i),
                "line_token": layers.add_line(road.point(ends, np.zeros(2))),
                "road_segment_token": segments[i]["token"],
            }
        )
        for side in (-1, 1):
            for number in range(1, road.lanes + 1):
                line = layers.add_line(road.point(ends, np.full(2, side * number * LANE)))
                kind = "DASHED_SEGMENT_WHITE" if number < road.lanes else "SINGLE_SOLID_WHITE"
                nodes = layers.line[-1]["node_tokens"]
                between.append(
                    {
                        "token": token("lane_divider", (i, side, number)),
                        "line_token": line,
                        "lane_divider_segments": [{"node_token": node, "segment_type": kind} for node in nodes],
                    }
                )
    return {"road_divider": middle, "lane_divider": between}


def map_mask(town: Town) -> Image.Image:
    """The mask of drivable surface and walkways: 255 inside, 0.1 m a pixel, north up."""
    image = Image.new("L", (round(EDGE * 10), round(EDGE * 10)))
    draw = ImageDraw.Draw(image)
    polygons = [polygon for channel, polygon, _ in town.paint if channel == "road"]
    polygons += [polygon for _, polygon in town.walkways()]
    for polygon in polygons:
        corners = np.asarray(polygon) * 10
        draw.polygon([(x, image.height - y) for x, y in corners.tolist()], fill=255)
    return image
