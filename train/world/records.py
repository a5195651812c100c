"""`maps/markings/<location>.json`: what is painted and built in the towns of a map, beyond what nuScenes' maps hold.

All coordinates are metres in the map's frame, all angles radians counter-clockwise from east. The file holds

- `version`: 1.
- `lines`: each with `type` (one of the nine of `LINE_TYPES`), `colour`, `role` (middle = between directions, between =
  between lanes of one direction, edge = outside the outer lane), `segment_type` (nuScenes' word), `points` (the line's
  middle, in the direction of the traffic for all but `middle`), and `sublines` from left to right in that direction,
  each with `offset` (metres to the left), `width` and `painted` ([from, to] arc lengths along `points`).
- `stop_lines`: `polygon`. `crossings`: `polygon` round the bars, and `bars`, their polygons.
- `signs`: `kind` (arrow_ahead, arrow_left, arrow_right and their combinations, diamond), `center`, `size` (length,
  width), `yaw` (where it points), `polygons` (the paint).
- `speed_bumps`: `center`, `size` (length along the road, width), `height`, `yaw` (along the road).
- `parking_slots`: `center`, `size` (depth along `yaw`, breadth), `yaw` (from the road into the slot), `polygon`.
- `solids`: everything that stands and never moves, but for bumps: `kind` (building, wall, tree, lamp, billboard,
  signal), `footprint` (polygon of what is below 0.5 m), `outline` (polygon of it all), `height`.

Every record names its `town` as the log table does.
"""

import numpy as np
import shapely

from .markings import crossing_stripes
from .scene import Scene

KNEE = 0.5  # metres


def markings_record(scenes: list[Scene]) -> dict:
    """The content of the file for the scenes whose towns lie on one map."""
    layers = {
        "lines": _lines, "stop_lines": _stop_lines, "crossings": _crossings, "signs": _signs,
        "speed_bumps": _speed_bumps, "parking_slots": _parking_slots, "solids": _solids,
    }  # fmt: skip
    rows = {
        name: [{"town": scene.town_name, **row} for scene in scenes for row in describe(scene)]
        for name, describe in layers.items()
    }
    return {"version": 1, **rows}


def _points(array):
    return np.asarray(array).round(4).tolist()


def _hull(vertices):
    return _points(shapely.get_coordinates(shapely.convex_hull(shapely.linestrings(vertices[:, :2])))[:-1])


def _lines(scene):
    for line in scene.markings.lines:
        road = scene.town.roads[line.road]
        points = road.line(line.s0, line.s1, line.t)
        arc = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
        along = np.linspace(0, abs(line.s1 - line.s0), len(points))  # pieces are measured along the straight
        yield {
            "type": line.kind,
            "colour": line.colour,
            "role": line.role,
            "segment_type": line.segment_type,
            "points": _points(points),
            "sublines": [
                {"offset": left, "width": width, "painted": np.interp(painted, along, arc).round(4).tolist()}
                for left, width, painted in line.pieces()
            ],
        }


def _stop_lines(scene):
    for road, _, *extent in scene.markings.stops:
        yield {"polygon": _points(scene.town.roads[road].strip(*extent))}


def _crossings(scene):
    for number, _, s0, s1 in scene.town.crossings():
        road = scene.town.roads[number]
        bars = [_points(road.strip(*bar)) for bar in crossing_stripes(road, s0, s1)]
        yield {"polygon": _points(road.strip(s0, s1, -road.half, road.half)), "bars": bars}


def _signs(scene):
    for sign in scene.markings.signs:
        road = scene.town.roads[sign.road]
        local, painted = sign.shapes(road)
        corners = np.concatenate([np.array(shape) for shape in local])
        yield {
            "kind": sign.kind,
            "center": _points(road.point(sign.s, sign.t)),
            "size": np.ptp(corners, axis=0).round(4).tolist(),
            "yaw": sign.heading(road),
            "polygons": [_points(shape) for shape in painted],
        }


def _speed_bumps(scene):
    for bump in scene.markings.bumps:
        road = scene.town.roads[bump.road]
        yield {
            "center": _points(road.point(bump.s, 0.0)),
            "size": [round(bump.length, 4), round(2 * road.edge, 4)],
            "height": round(bump.height, 4),
            "yaw": float(road.heading(bump.s)),
        }


def _parking_slots(scene):
    for slot in scene.markings.slots:
        road = scene.town.roads[slot.road]
        s, deep = (slot.s0 + slot.s1) / 2, road.bay - 0.3
        yield {
            "center": _points(road.point(s, slot.side * (road.edge + deep / 2))),
            "size": [round(deep, 4), round(slot.s1 - slot.s0, 4)],
            "yaw": float(road.heading(s)) + slot.side * np.pi / 2,
            "polygon": _points(road.strip(slot.s0, slot.s1, slot.side * road.edge, slot.side * (road.edge + deep))),
        }


def _solids(scene):
    standing = [item for item in scene.scenery if item.kind != "speed_bump"]
    for item in standing + [bodies["red"] for _, _, bodies in scene.signals]:
        vertices = item.body.vertices @ item.rotation.T + item.position
        starts = item.body.vertex_starts
        parts = [vertices[a:b] for a, b in zip(starts[:-1], starts[1:])]
        low = np.concatenate([part for part in parts if part[:, 2].min() < KNEE])
        yield {
            "kind": item.kind,
            "footprint": _hull(low),
            "outline": _hull(vertices),
            "height": round(float(item.body.size[2]), 4),
        }
