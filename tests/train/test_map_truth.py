"""Map lines around a pose: a map made by hand, poses that move with the map, the world's maps and real ones."""

import json

import numpy as np
import pytest
import shapely

from rigfuse.modules.poses import rigid, rotation_xyz, rotation_z
from rigfuse.train.data import open_drives
from rigfuse.train.data.map_truth import MAP_CLASSES, VectorMap, scene_locations
from rigfuse.train.data.nuscenes import open_nuscenes

DIVIDER, CROSSING, BOUNDARY = range(3)
PLACE = "singapore-onenorth"  # the smallest mask


class HandMade:
    """A map expansion from coordinates, all of them moved by `world_T_plan`."""

    def __init__(self, world_T_plan=np.eye(4)):
        self.world_T_plan = world_T_plan
        layers = ("node", "line", "polygon", "lane_divider", "road_divider", "ped_crossing", "road_segment", "lane")
        self.content = {layer: [] for layer in layers}

    def nodes(self, points):
        points = np.asarray(points) @ self.world_T_plan[:2, :2].T + self.world_T_plan[:2, 3]
        rows = [
            {"token": f"n{len(self.content['node']) + i}", "x": x, "y": y} for i, (x, y) in enumerate(points.tolist())
        ]
        self.content["node"] += rows
        return [row["token"] for row in rows]

    def line(self, layer, points):
        token = f"l{len(self.content['line'])}"
        self.content["line"].append({"token": token, "node_tokens": self.nodes(points)})
        self.content[layer].append({"token": token, "line_token": token})
        return self

    def polygon(self, layer, points, holes=()):
        token = f"p{len(self.content['polygon'])}"
        holes = [{"node_tokens": self.nodes(hole)} for hole in holes]
        row = {"token": token, "exterior_node_tokens": self.nodes(points), "holes": holes}
        self.content["polygon"].append(row)
        self.content[layer].append({"token": token, "polygon_token": token})
        return self


def rectangle(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def town_content(world_T_plan=np.eye(4)):
    """A road along x, 8 m wide, with a traffic island, a side road, dividers in pieces and two crossings."""
    plan = HandMade(world_T_plan)
    plan.polygon("road_segment", rectangle(-100, -4, 10, 4), [rectangle(-20, -1, -14, 1)])
    plan.polygon("road_segment", rectangle(10, -4, 100, 4))
    plan.polygon("lane", rectangle(4, 4, 12, 60))  # a side road to the left
    plan.line("lane_divider", [(-100, 2), (-5, 2)]).line("lane_divider", [(20, 2), (-5, 2)])
    plan.line("road_divider", [(20, 2), (29.5, 2)]).line("lane_divider", [(-5, 2), (20, 2)])
    plan.line("lane_divider", [(-100, -2), (-29.2, -2)])  # 0.8 m of it are in the patch
    plan.polygon("ped_crossing", rectangle(14, -4, 16, 0)).polygon("ped_crossing", rectangle(14, 0, 16, 4))
    plan.polygon("ped_crossing", rectangle(4, 10, 12, 20))
    return plan.content


def town(world_T_plan=np.eye(4)):
    return VectorMap(town_content(world_T_plan))


def of(lines, label):
    return [line for own, line in zip(lines.labels, lines.lines) if own == label]


def same(lines, expected):
    """Whether each line has a partner with the same vertices, whatever their order, direction and first vertex."""

    def vertices(line):
        line = np.asarray(line)[: -1 if (np.asarray(line)[0] == np.asarray(line)[-1]).all() else None]
        return sorted(map(tuple, line.round(2) + 0.0))

    return sorted(map(vertices, lines)) == sorted(map(vertices, expected))


def test_by_hand():
    lines = town().lines(np.eye(4))
    assert MAP_CLASSES == ("divider", "ped_crossing", "boundary")
    # One divider from three pieces and a copy, in two layers; 0.8 m of another are too short.
    (divider,) = of(lines, DIVIDER)
    assert same([divider], [[(-30, 2), (-5, 2), (20, 2), (29.5, 2)]])
    # Two halves of a crossing are one; one that the patch cuts is closed along its edge.
    crossings = of(lines, CROSSING)
    assert all((line[0] == line[-1]).all() for line in crossings)
    assert {shapely.Polygon(line).bounds for line in crossings} == {(14, -4, 16, 4), (4, 10, 12, 15)}
    assert all(shapely.LinearRing(line).is_ccw for line in crossings)
    # Segments and lanes are one surface: no line where they meet, none along the patch's edge.
    assert same(
        of(lines, BOUNDARY),
        [
            [(-29.8, -4), (29.8, -4)],
            [(-29.8, 4), (4, 4), (4, 14.8)],
            [(12, 14.8), (12, 4), (29.8, 4)],
            [*rectangle(-20, -1, -14, 1), (-20, -1)],
        ],
    )
    assert lines.labels.tolist() == sorted(lines.labels) and lines.labels.dtype == np.int64


def test_the_road_is_on_the_right():
    surface = shapely.box(-100, -4, 100, 4).union(shapely.box(4, 4, 12, 60)) - shapely.box(-20, -1, -14, 1)
    for line in of(town().lines(rigid(rotation_z(0.3), [1.0, 0.5, 0])), BOUNDARY):
        line = line @ rotation_z(0.3)[:2, :2].T + [1.0, 0.5]
        along = np.diff(line, axis=0)
        right = np.stack([along[:, 1], -along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
        middle = (line[1:] + line[:-1]) / 2
        assert shapely.contains_xy(surface, middle + 0.05 * right).all()
        assert not shapely.contains_xy(surface, middle - 0.05 * right).any()


def test_a_ring_that_begins_inside_the_patch_is_not_cut_there():
    for first in range(6):
        corners = np.roll([(0, 5), (-50, 4), (-50, -4), (0, -5), (50, -4), (50, 4)], first, axis=0)
        lines = of(VectorMap(HandMade().polygon("road_segment", corners).content).lines(np.eye(4)), BOUNDARY)
        y = 5 - 29.8 / 50
        assert same(lines, [[(-29.8, y), (0, 5), (29.8, y)], [(-29.8, -y), (0, -5), (29.8, -y)]])


def test_neighbours_that_share_no_corner_have_no_boundary_between_them():
    for gap, number in ((0.0, 2), (0.009, 2), (0.03, 4)):
        plan = HandMade().polygon("road_segment", rectangle(-50, -4, 50, 0))
        plan.polygon("road_segment", rectangle(-40, gap, 7, 4)).polygon("lane", rectangle(7, gap, 60, 4))
        assert len(of(VectorMap(plan.content).lines(np.eye(4)), BOUNDARY)) == number


@pytest.mark.parametrize("yaw, x, y", [(0.0, 0.0, 0.0), (np.pi / 2, 700.0, 1300.0), (2.1, 1234.56, 789.01)])
def test_lines_move_with_the_pose(yaw, x, y):
    """Turning and shifting map and car together changes nothing; roll, pitch and height of the car neither."""
    moved = rigid(rotation_z(yaw), [x, y, 0.0])
    for pose in (np.eye(4), rigid(rotation_z(-0.4), [3.0, -2.0, 0.0])):
        expected, lines = town().lines(pose), town(moved).lines(moved @ pose)
        assert lines.labels.tolist() == expected.labels.tolist()
        for label in range(3):
            ours, theirs = (shapely.MultiLineString(of(part, label)) for part in (lines, expected))
            assert shapely.hausdorff_distance(ours.segmentize(0.5), theirs.segmentize(0.5)) < 0.02
            assert ours.length == pytest.approx(theirs.length, abs=0.02)
    tilted = rigid(rotation_xyz(0.03, -0.02, yaw), [x, y, 5.0])
    assert [line.tolist() for line in town(moved).lines(tilted).lines] == [
        line.tolist() for line in town(moved).lines(moved).lines
    ]


def test_the_order_of_the_maps_rows_does_not_count():
    content = town_content()
    for rows in content.values():
        rows.reverse()
    lines, expected = VectorMap(content).lines(np.eye(4)), town().lines(np.eye(4))
    assert lines.labels.tolist() == expected.labels.tolist()
    assert [line.tolist() for line in lines.lines] == [line.tolist() for line in expected.lines]


def test_an_empty_place_and_other_sizes():
    away = town().lines(rigid(np.eye(3), [0.0, 500.0, 0.0]))
    assert away.labels.shape == (0,) and away.lines == []
    wide = town().lines(np.eye(4), (100.0, 50.0))
    assert max(np.abs(line[:, 0]).max() for line in of(wide, DIVIDER)) == 50
    empty = VectorMap(HandMade().content).lines(np.eye(4))
    assert empty.lines == []


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no map of boston-seaport: .*boston-seaport.json"):
        VectorMap.load(tmp_path, "boston-seaport")
    (tmp_path / "maps" / "expansion").mkdir(parents=True)
    for name, text, message in (
        ("a", "{}", "a.json: the map has no layer node, line"),
        ("b", "{", "b.json: Expecting"),
        ("c", json.dumps(town_content() | {"node": []}), "c.json: the map names 'n[0-9]+', which it does not have"),
    ):
        (tmp_path / "maps" / "expansion" / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            VectorMap.load(tmp_path, name)


def samples(root, every):
    """Some key frames, with the map of their place."""
    locations, maps = scene_locations(open_nuscenes(root)), {}
    for drive in open_drives(root):
        vector_map = maps.setdefault(locations[drive.name], VectorMap.load(root, locations[drive.name]))
        for index in range(0, len(drive), every):
            yield locations[drive.name], vector_map, drive[index].world_T_ego.numpy()


def test_the_generated_world_has_every_class(small_world):
    counts = np.zeros(3, dtype=int)
    for _, vector_map, pose in samples(small_world, 1):
        lines = vector_map.lines(pose)
        counts += np.bincount(lines.labels, minlength=3)
        for line in lines.lines:
            assert (np.abs(line) <= (30, 15)).all() and (line == line.round(3)).all()
            assert np.linalg.norm(np.diff(line, axis=0), axis=1).sum() >= 0.999
    assert (counts > 0).all()


def test_real_dividers_are_those_of_the_devkit(nuscenes_root):
    from nuscenes.map_expansion.map_api import NuScenesMap

    maps = {}
    for location, vector_map, pose in samples(nuscenes_root, 40):
        if location not in maps:
            maps[location] = NuScenesMap(str(nuscenes_root), location).explorer
        yaw = np.degrees(np.arctan2(pose[1, 0], pose[0, 0]))
        layers = [
            maps[location]._get_layer_line((*pose[:2, 3], 30, 60), yaw, layer)
            for layer in ("lane_divider", "road_divider")
        ]
        theirs = shapely.union_all([line for layer in layers for line in layer])
        ours = shapely.MultiLineString(of(vector_map.lines(pose), DIVIDER))
        assert shapely.difference(ours.segmentize(1.0), theirs.buffer(0.003)).length < 0.01
        missing = shapely.get_parts(shapely.difference(theirs, ours.buffer(0.003)))
        assert all(piece.length < 1.001 for piece in missing)


def test_real_boundaries_lie_where_the_drivable_area_ends(nuscenes_root, monkeypatch):
    """Of the mask that comes with the maps, which the lines were not made from."""
    from PIL import Image

    nusc, inside, outside = open_nuscenes(nuscenes_root), [], []
    (log,) = {row["token"] for row in nusc.log if row["location"] == PLACE} & {row["log_token"] for row in nusc.scene}
    (file,) = [row["filename"] for row in nusc.map if log in row["log_tokens"]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(nuscenes_root / file) as image:
        mask = np.asarray(image)
    for location, vector_map, pose in samples(nuscenes_root, 5):
        if location != PLACE:
            continue
        for line in of(vector_map.lines(pose), BOUNDARY):
            along = np.diff(line, axis=0)
            right = np.stack([along[:, 1], -along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
            middle = (line[1:] + line[:-1]) / 2
            for offset, found in ((0.4, inside), (-0.4, outside)):
                points = (middle + offset * right) @ pose[:2, :2].T + pose[:2, 3]
                column, row = (points * 10).astype(int).T
                found += (mask[len(mask) - 1 - row, column] > 0).tolist()
    assert np.mean(inside) > 0.97 and np.mean(outside) < 0.4
