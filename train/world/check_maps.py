"""Rules of a generated world's maps: the drivable area is whole, lanes lie on it, and the records are complete."""

import json

from shapely import Polygon, prepare, unary_union

from .markings import LINE_TYPES

SMALLEST_HOLE = 100.0  # square metres; what roads enclose is a block of houses
FIELDS = {
    "lines": {"town", "type", "colour", "role", "segment_type", "points", "sublines"},
    "stop_lines": {"town", "polygon"},
    "crossings": {"town", "polygon", "bars"},
    "signs": {"town", "kind", "center", "size", "yaw", "polygons"},
    "speed_bumps": {"town", "center", "size", "height", "yaw"},
    "parking_slots": {"town", "center", "size", "yaw", "polygon"},
    "solids": {"town", "kind", "footprint", "outline", "height"},
}


def check_maps(checker) -> None:
    """Adds complaints about the maps to those of a `WorldChecker`."""
    for location in sorted({row["location"] for row in checker.tables["log"]}):
        towns = {row["town"] for row in checker.tables["log"] if row["location"] == location}
        for folder, check in (("expansion", _check_expansion), ("markings", _check_markings)):
            path = checker.path(f"maps/{folder}/{location}.json")
            if path is None:
                continue
            try:
                check(checker, path.name, json.loads(path.read_text()), towns)
            except (ValueError, KeyError, TypeError) as error:
                what = f"{folder}/{path.name} cannot be read: {type(error).__name__}: {error}"
                checker.complain("maps", what)


def polygons_of(expansion: dict, layer: str) -> list[Polygon]:
    """The polygons of a layer of a map expansion."""
    nodes = {row["token"]: (row["x"], row["y"]) for row in expansion["node"]}
    tokens = {row["token"]: row["exterior_node_tokens"] for row in expansion["polygon"]}
    return [Polygon([nodes[node] for node in tokens[row["polygon_token"]]]) for row in expansion[layer]]


def _check_expansion(checker, name, expansion, towns):
    layers = ("road_segment", "lane", "lane_connector", "ped_crossing", "walkway", "stop_line", "carpark_area")
    polygons = {layer: polygons_of(expansion, layer) for layer in layers}
    for layer in layers:
        broken = sum(not polygon.is_valid for polygon in polygons[layer])
        if broken:
            checker.complain("map polygons", f"{name}: {broken} of {layer} cross themselves")
    area = unary_union(polygons["road_segment"] + polygons["lane"])
    parts = list(getattr(area, "geoms", [area]))
    if len(parts) != len(towns):
        checker.complain("drivable area", f"{name}: it has {len(parts)} parts and {len(towns)} towns")
    holes = [Polygon(ring).area for part in parts for ring in part.interiors]
    small = [hole for hole in holes if hole < SMALLEST_HOLE]
    if small:
        checker.complain("drivable area", f"{name}: {len(small)} holes, the smallest of {min(small):.2g} m²")
    for layer, slack in (("lane_connector", 1e-3), ("ped_crossing", 0.02), ("stop_line", 0.02)):
        wide = area.buffer(slack)
        prepare(wide)
        outside = sum(not wide.covers(polygon) for polygon in polygons[layer])
        if outside:
            checker.complain("drivable area", f"{name}: {outside} of {layer} leave it")


def _check_markings(checker, name, markings, towns):
    for layer, fields in FIELDS.items():
        for row in markings[layer]:
            if set(row) != fields or row["town"] not in towns:
                checker.complain(
                    "markings", f"{name}: {layer} has a row with {sorted(row)} of town {row.get('town')!r}"
                )
                break
    unknown = {row["type"] for row in markings["lines"]} - set(LINE_TYPES)
    if unknown:
        checker.complain("markings", f"{name}: unknown types of lines {sorted(unknown)}")
