"""What is true of the ground round a pose: from nuScenes' map expansion, and beyond it from `maps/markings/`.

| | map expansion alone | with maps/markings/LOCATION.json (see `train/world/records.py`) |
|---|---|---|
| lane markings | dividers; the types that nuScenes has words for, the others of unknown type | all nine types |
| Road, Lane, Curb | road segments and lanes; lanes; the contour of the road | the same |
| Wall, instances | not known | walls and houses; bumps, signs, parking slots |

What a source does not know is marked as such, so that it is not learned as background.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ....kernels.runtime.extras import optional
from ....modules.static_bev.grid import BevGrid
from ....modules.static_bev.head import HeadConfig
from ....modules.static_bev.losses import StaticTruth
from ...data.map_truth import layer_polygons, road_contours
from .raster import draw_areas, draw_lines

shapely = optional("train", "shapely")

# nuScenes' words for lines; what is not here (NIL, SINGLE_ZIGZAG_WHITE, nothing) is of unknown type.
SEGMENT_TYPES = {
    "SINGLE_SOLID_WHITE": "SolidLine",
    "SINGLE_SOLID_YELLOW": "SolidLine",
    "DOUBLE_SOLID_WHITE": "DoubleSolidLine",
    "DOUBLE_DASHED_WHITE": "DoubleDashedLine",
}
_WALLS = ("wall", "building")
_RECORDS = {"speed_bumps": "SpeedBump", "signs": "GroundSigns", "parking_slots": "ParkingSlot"}
_MARGIN = 1.0  # metres beyond the grid within which lines are still cut out
_STRAIGHT = 0.01  # metres that a line may be moved by to have fewer points
_LINE, _AREA, _INSTANCE = range(3)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What lies round a pose, in the ego frame, metres.

    Args:
        lines: lane markings, each (N, 2).
        labels: (L,) int64, place of each among the lane classes; −1 = unknown.
        outlines: road class → lines (N, 2), such as kerbs.
        areas: road class → polygons.
        instances: (G, 6) float32: x, y, length, width, angle, class.
        lanes_known, road_known, instances_known: which classes the source knows of, bool.
    """

    lines: list[np.ndarray]
    labels: np.ndarray
    outlines: dict[str, list[np.ndarray]]
    areas: dict[str, list]
    instances: np.ndarray
    lanes_known: np.ndarray
    road_known: np.ndarray
    instances_known: np.ndarray


class StaticMap:
    """The static ground of one place, indexed once.

    Args:
        expansion: the JSON of a map expansion.
        markings: the JSON of its markings; None = there is none.
        head: whose classes are asked for.

    Raises:
        ValueError: a layer, or something that one names, is missing.
    """

    def __init__(self, expansion: dict, markings: dict | None, head: HeadConfig):
        self.head = head
        self._shapes, self._keys = [], []  # (kind, class) of each shape; of instances (kind, row)
        self._instances: list[tuple] = []
        try:
            self._roads(expansion)
            if markings is None:
                self._dividers(expansion)
            else:
                self._markings(markings)
        except KeyError as error:
            raise ValueError(f"the map has no {error}; needs nuScenes' map expansion, schema 1.3") from None
        self._array = np.array(self._shapes, dtype=object)
        self._tree = shapely.STRtree(self._array)
        known = set(SEGMENT_TYPES.values()) if markings is None else set(head.lanes)
        self.lanes_known = np.array([name in known for name in head.lanes])
        self.road_known = np.array([name != "Wall" or markings is not None for name in head.road])
        self.instances_known = np.full(len(head.instances), markings is not None)

    @classmethod
    def load(cls, root: str | Path, location: str, head: HeadConfig) -> "StaticMap":
        """Loads the map of a location under a nuScenes root.

        Raises:
            FileNotFoundError: there is no map expansion of it.
            ValueError: a file is no map.
        """
        path = Path(root) / "maps" / "expansion" / f"{location}.json"
        beside = path.parent.with_name("markings") / path.name
        if not path.is_file():
            raise FileNotFoundError(f"no map of {location}: {path} (nuScenes' map expansion)")
        files = tuple((each, each.stat().st_mtime_ns) for each in (path, beside) if each.is_file())
        return _read_map(files, tuple(head.lanes), tuple(head.road), tuple(head.instances))

    def around(self, world_T_ego: torch.Tensor, grid: BevGrid) -> GroundTruth:
        """What lies on a grid round a pose (4, 4); of its rotation only the yaw counts."""
        pose = np.asarray(world_T_ego, dtype=np.float64)
        yaw = np.arctan2(pose[1, 0], pose[0, 0])
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        box = shapely.box(grid.x[0] - _MARGIN, grid.y[0] - _MARGIN, grid.x[1] + _MARGIN, grid.y[1] + _MARGIN)
        place = shapely.transform(box, lambda points: points @ turn.T + pose[:2, 3])
        found = np.sort(self._tree.query(place, predicate="intersects"))
        shapes = shapely.transform(self._array[found], lambda points: (points - pose[:2, 3]) @ turn)
        head, lines, labels, instances = self.head, [], [], []
        outlines, areas = ({name: [] for name in head.road} for _ in range(2))
        for shape, (kind, key) in zip(shapes, (self._keys[place] for place in found)):
            if kind == _INSTANCE:
                label, length, width, angle = self._instances[key]
                x, y = shapely.get_coordinates(shape)[0]
                inside = grid.x[0] <= x < grid.x[1] and grid.y[0] <= y < grid.y[1]
                instances += [(x, y, length, width, angle - yaw, label)] if inside else []
            elif kind == _AREA:
                areas[key].append(shape)
            else:
                pieces = [
                    shapely.get_coordinates(part)
                    for part in shapely.get_parts(shapely.intersection(shape, box))
                    if part.geom_type == "LineString"
                ]
                if isinstance(key, str):
                    outlines[key] += pieces
                else:
                    lines, labels = lines + pieces, labels + [key] * len(pieces)
        rows = np.array(instances, dtype=np.float32).reshape(-1, 6)
        known = self.lanes_known, self.road_known, self.instances_known
        return GroundTruth(lines, np.array(labels, dtype=np.int64), outlines, areas, rows, *known)

    def _add(self, shape, kind, key):
        self._shapes.append(shape)
        self._keys.append((kind, key))

    def _add_line(self, points, key):
        if len(points) > 1:
            self._add(shapely.simplify(shapely.LineString(points), _STRAIGHT), _LINE, key)

    def _roads(self, expansion):
        nodes = {row["token"]: (row["x"], row["y"]) for row in expansion["node"]}
        lines = {row["token"]: row["node_tokens"] for row in expansion["line"]}
        self._line = lambda token: [nodes[name] for name in lines[token]]

        def shapes(layer):
            for polygon in layer_polygons(expansion, layer, nodes):
                parts = shapely.get_parts(shapely.make_valid(polygon))
                yield from (part for part in parts if part.geom_type == "Polygon")

        lanes = list(shapes("lane"))
        roads = [*shapes("road_segment"), *lanes]
        road = shapely.get_parts(shapely.union_all(roads)) if "Road" in self.head.road else []
        for name, found in (("Lane", lanes if "Lane" in self.head.road else []), ("Road", road)):
            for polygon in found:
                self._add(polygon, _AREA, name)
        if "Curb" in self.head.road:
            for ring in road_contours(np.array(roads, dtype=object)):
                self._add_line(shapely.get_coordinates(ring), "Curb")

    def _dividers(self, expansion):
        """Lines with one type from end to end are of that type, others of unknown type."""
        for row in expansion["road_divider"]:
            self._add_line(self._line(row["line_token"]), -1)
        for row in expansion["lane_divider"]:
            words = {segment["segment_type"] for segment in row["lane_divider_segments"]}
            kind = SEGMENT_TYPES.get(words.pop()) if len(words) == 1 else None
            self._add_line(self._line(row["line_token"]), _place(kind, self.head.lanes))

    def _markings(self, markings):
        for row in markings["lines"]:
            self._add_line(row["points"], _place(row["type"], self.head.lanes))
        if "Wall" in self.head.road:
            for row in markings["solids"]:
                if row["kind"] in _WALLS and len(row["footprint"]) > 2:
                    self._add_line([*row["footprint"], row["footprint"][0]], "Wall")
        for layer, name in _RECORDS.items():
            if name in self.head.instances:
                for row in markings[layer]:
                    self._instances.append((self.head.instances.index(name), *row["size"], row["yaw"]))
                    self._add(shapely.Point(row["center"]), _INSTANCE, len(self._instances) - 1)


@lru_cache(maxsize=8)
def _read_map(files, lanes, road, instances):
    """A map of one or two files with their times; read once for training, validation and every run that is compared."""
    try:
        expansion, markings = ([json.loads(path.read_text()) for path, _ in files] + [None])[:2]
        return StaticMap(expansion, markings, HeadConfig(lanes, road, instances))
    except ValueError as error:
        raise ValueError(f"{files[0][0]}: {error}") from error


def labels_of(truth: GroundTruth, grid: BevGrid, head: HeadConfig, width: float) -> StaticTruth:
    """Draws a truth into a grid: a batch of one.

    Args:
        truth: in the ego frame.
        grid: of the labels.
        head: the classes.
        width: metres, of all lines.
    """
    lanes = np.zeros((len(head.lanes), *grid.shape), dtype=np.uint8)
    for label in np.unique(truth.labels[truth.labels >= 0]):
        lanes[label] = _bytes(draw_lines(grid, _with(truth, label), width))
    unknown = _bytes(draw_lines(grid, _with(truth, -1), width))
    road = [
        _bytes(np.maximum(draw_areas(grid, truth.areas[name]), draw_lines(grid, truth.outlines[name], width)))
        for name in head.road
    ]
    return StaticTruth(
        torch.from_numpy(lanes)[None], torch.from_numpy(unknown)[None], torch.from_numpy(truth.lanes_known)[None],
        torch.from_numpy(np.stack(road))[None], torch.from_numpy(truth.road_known)[None],
        [torch.from_numpy(truth.instances)], torch.from_numpy(truth.instances_known)[None],
    )  # fmt: skip


def _with(truth, label):
    return [line for line, own in zip(truth.lines, truth.labels) if own == label]


def _bytes(coverage):
    return np.round(255 * coverage).astype(np.uint8)


def _place(name, names):
    return names.index(name) if name in names else -1
