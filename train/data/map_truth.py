"""True map lines around the ego car, from the map expansion of nuScenes (schema 1.3) or of a generated world.

The rules are those of MapTR and StreamMapNet: "divider" = lane_divider and road_divider; "ped_crossing" = outlines of
crossings, parallel ones that touch merged; "boundary" = the contour of the union of road_segment and lane. Pieces that
touch are merged, then what is shorter than `SHORTEST` is dropped.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...kernels.runtime.extras import optional

shapely = optional("train", "shapely")

MAP_CLASSES = ("divider", "ped_crossing", "boundary")
SHORTEST = 1.0  # metres of a line
_MARGIN = 0.2  # metres that a boundary keeps from the patch's edge, which would be a boundary itself
_GAP = 0.01  # metres: neighbours that share no corner are, rounded, up to a millimetre apart; that is no boundary
_PARALLEL = 0.99  # cosine of the angle between two crossings that are one (8 degrees)
_DECIMALS = 3  # everything is rounded to 1 mm, so that what depends on order or touch is the same everywhere
_LAYERS = ("node", "line", "polygon", "lane_divider", "road_divider", "ped_crossing", "road_segment", "lane")


@dataclass(frozen=True, eq=False)
class MapLines:
    """Lines in the ego frame: x ahead, y left, metres.

    Args:
        labels: (L,) int64, places in `MAP_CLASSES`.
        lines: L arrays (N, 2) float64, N ≥ 2, sorted by class, then by coordinates. A closed line repeats its first
            point. Crossings are closed and run counter-clockwise; along a boundary the road is on the right.
    """

    labels: np.ndarray
    lines: list[np.ndarray]


class VectorMap:
    """The map of one place, indexed once, from which the lines around any pose are cut.

    Args:
        content: the JSON of a map expansion.

    Raises:
        ValueError: a layer or a node is missing.
    """

    def __init__(self, content: dict):
        absent = [name for name in _LAYERS if name not in content]
        if absent:
            raise ValueError(f"the map has no layer {', '.join(absent)}; needs nuScenes' map expansion, schema 1.3")
        try:
            dividers, crossings, roads = _read(content)
        except KeyError as error:
            raise ValueError(f"the map names {error}, which it does not have") from None
        self._shapes = np.array([*dividers, *crossings, *roads], dtype=object)
        self._kinds = np.repeat(np.arange(3), [len(dividers), len(crossings), len(roads)])
        self._tree = shapely.STRtree(self._shapes)

    @classmethod
    def load(cls, root: str | Path, location: str) -> "VectorMap":
        """Loads the map of a location, such as "singapore-onenorth", under a nuScenes root.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no map expansion.
        """
        path = Path(root) / "maps" / "expansion" / f"{location}.json"
        if not path.is_file():
            raise FileNotFoundError(f"no map of {location}: {path} (nuScenes' map expansion)")
        try:
            return cls(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def lines(self, world_T_ego, size: tuple[float, float] = (60.0, 30.0)) -> MapLines:
        """Returns the lines in a rectangle around the ego car, turned with it.

        Args:
            world_T_ego: (4, 4) pose; of its rotation only the yaw counts.
            size: metres ahead and behind together, metres to both sides together.
        """
        world_T_ego = np.asarray(world_T_ego, dtype=np.float64)
        yaw = np.arctan2(world_T_ego[1, 0], world_T_ego[0, 0])
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        half = np.array(size) / 2
        patch = shapely.box(*-half, *half)
        place = shapely.transform(patch, lambda points: points @ turn.T + world_T_ego[:2, 3])
        found = np.sort(self._tree.query(place, predicate="intersects"))
        shapes = shapely.transform(self._shapes[found], lambda points: (points - world_T_ego[:2, 3]) @ turn)
        shapes, kinds = shapely.intersection(shapes, patch), self._kinds[found]
        inner = shapely.box(*(_MARGIN - half), *(half - _MARGIN))
        contours = [shapely.intersection(ring, inner) for ring in road_contours(shapes[kinds == 2])]
        by_class = (
            _merged(shapes[kinds == 0]),
            [shapely.geometry.polygon.orient(polygon).exterior for polygon in _parts(shapes[kinds == 1], "Polygon")],
            _merged(contours),
        )
        rows = []
        for label, lines in enumerate(by_class):
            points = [_rounded(line) for line in lines if line.length >= SHORTEST]
            rows += sorted((label, points.tolist()) for points in points if len(points) > 1)
        labels = np.array([label for label, _ in rows], dtype=np.int64)
        return MapLines(labels, [np.array(points) for _, points in rows])


def scene_locations(nusc) -> dict[str, str]:
    """Returns scene name → location, of the devkit's `NuScenes`."""
    return {scene["name"]: nusc.get("log", scene["log_token"])["location"] for scene in nusc.scene}


def layer_polygons(expansion: dict, layer: str, nodes: dict[str, tuple[float, float]]) -> Iterator:
    """The shapely polygons of a layer of a map expansion, whose `nodes` lie by token; not made valid."""
    polygons = {row["token"]: row for row in expansion["polygon"]}
    for row in expansion[layer]:
        polygon = polygons[row["polygon_token"]]
        shell, *holes = (
            [nodes[name] for name in names]
            for names in (polygon["exterior_node_tokens"], *(hole["node_tokens"] for hole in polygon["holes"]))
        )
        if len(shell) > 2:
            yield shapely.Polygon(shell, [hole for hole in holes if len(hole) > 2])


def _read(content):
    """Dividers, crossings and roads in the world frame, merged where that does not depend on a pose."""
    nodes = {row["token"]: (round(row["x"], _DECIMALS), round(row["y"], _DECIMALS)) for row in content["node"]}
    line_rows = {row["token"]: row["node_tokens"] for row in content["line"]}
    polygons = lambda layer: layer_polygons(content, layer, nodes)  # noqa: E731
    lines = {
        min(points, points[::-1])  # the same line twice, or there and back, would close a ring
        for layer in ("lane_divider", "road_divider")
        for row in content[layer]
        if len(points := tuple(nodes[name] for name in line_rows[row["line_token"]])) > 1
    }
    dividers = _merged([shapely.LineString(points) for points in sorted(lines)])
    roads = _parts(shapely.make_valid([*polygons("road_segment"), *polygons("lane")]), "Polygon")
    return dividers, _one_where_parallel(_parts(shapely.make_valid([*polygons("ped_crossing")]), "Polygon")), roads


def _one_where_parallel(polygons):
    """Crossings, those joined that touch and are parallel: one that is painted is often several in the map."""
    if not polygons:
        return []
    polygons = np.array(polygons, dtype=object)
    frames = shapely.get_coordinates(shapely.oriented_envelope(polygons)).reshape(len(polygons), 5, 2)
    sides = np.diff(frames[:, :3], axis=1)  # (n, 2, 2): two sides of each
    longest = np.linalg.norm(sides, axis=2).argmax(axis=1)
    along = sides[np.arange(len(sides)), longest]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    same = np.abs((along[first] * along[second]).sum(axis=1)) > _PARALLEL
    pairs = coo_array((np.ones(same.sum()), (first[same], second[same])), shape=(len(polygons),) * 2)
    number, group = connected_components(pairs, directed=False)
    return _parts([shapely.union_all(polygons[group == index]) for index in range(number)], "Polygon")


def road_contours(polygons):
    """Yields the rings of the union of polygons, the union on the right of each."""
    style = dict(join_style="mitre", mitre_limit=10.0)
    closed = shapely.buffer(shapely.buffer(shapely.union_all(polygons), _GAP / 2, **style), -_GAP / 2, **style)
    for polygon in _parts([closed], "Polygon"):
        polygon = shapely.geometry.polygon.orient(polygon, sign=-1.0)
        yield from (polygon.exterior, *polygon.interiors)


def _merged(shapes):
    """The lines in some shapes, joined where two and no third meet end to end."""
    lines = _parts(shapes, "LineString", "LinearRing")
    return _parts([shapely.line_merge(shapely.multilinestrings(lines))], "LineString") if lines else []


def _parts(shapes, *kinds):
    """The pieces of these kinds: a line clipped by a polygon may be a line, several, a point, or a mixture."""
    parts = shapely.get_parts(shapely.get_parts(np.asarray(shapes, dtype=object).reshape(-1)))
    return [part for part in parts if part.geom_type in kinds and not part.is_empty]


def _rounded(line):
    points = np.round(shapely.get_coordinates(line), _DECIMALS) + 0.0  # no −0
    return points[np.concatenate([[True], (np.diff(points, axis=0) != 0).any(axis=1)])]
