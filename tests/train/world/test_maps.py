"""Maps against what is painted, drawn and scanned: every record is where its paint is, and all paint is recorded."""

import json

import numpy as np
import pytest
import shapely
from PIL import Image
from shapely import LineString, Polygon, contains_xy, unary_union

from rigfuse.modules.poses import from_row
from rigfuse.train.world import read_depth
from rigfuse.train.world.casting import Pinhole
from rigfuse.train.world.check_maps import polygons_of
from rigfuse.train.world.expansion import map_expansion
from rigfuse.train.world.ground import Ground
from rigfuse.train.world.markings import LINE_TYPES, paint_of
from rigfuse.train.world.records import markings_record
from rigfuse.train.world.scene import Scene
from rigfuse.train.world.tables import depth_name

ROAD, WHITE, YELLOW = 0, 1, 2


@pytest.fixture(scope="module", params=["streets", "parking"])
def town(request):
    return Scene(seed=1, index=2, samples=2, style=request.param)


@pytest.fixture(scope="module")
def record(town):
    return json.loads(json.dumps(markings_record([town])))


@pytest.fixture(scope="module")
def expansion(town):
    return map_expansion([town], lambda kind, key: f"{kind}/{key}")


@pytest.fixture(scope="module")
def ground(town):
    nodes = town.town.nodes
    return Ground((*(nodes.min(0) - 25), *(nodes.max(0) + 25)), paint_of(town.town, town.markings))


def within(area, points):
    """(N,) whether points (N, 2) are in an area."""
    shapely.prepare(area)
    return contains_xy(area, points[:, 0], points[:, 1])


def covered(ground, points):
    """(N, 4) coverage of road, white, yellow, lawn."""
    points = np.asarray(points, dtype=float)
    return ground.coverage(points[:, 0], points[:, 1], np.full(len(points), 0.02))


def along(line, shift, arcs):
    """Points at arc lengths of a polyline, moved `shift` metres to its left."""
    curve = LineString(line)
    points = shapely.get_coordinates(shapely.line_interpolate_point(curve, arcs))
    ahead = shapely.get_coordinates(shapely.line_interpolate_point(curve, np.asarray(arcs) + 0.05))
    back = shapely.get_coordinates(shapely.line_interpolate_point(curve, np.asarray(arcs) - 0.05))
    way = (ahead - back) / np.linalg.norm(ahead - back, axis=1, keepdims=True)
    return points + shift * np.stack([-way[:, 1], way[:, 0]], axis=1)


def test_every_line_is_painted_as_its_type_says(record, ground):
    """On each sub-line: paint inside its pieces, none in its gaps, none beside it; widths as recorded."""
    for row in record["lines"]:
        channel = {"white": WHITE, "yellow": YELLOW}[row["colour"]]
        assert len(row["sublines"]) == len(LINE_TYPES[row["type"]])
        length = LineString(row["points"]).length
        for sub in row["sublines"]:
            painted = np.array(sub["painted"])
            assert painted.min() >= 0 and painted.max() <= length + 1e-3
            inside = (painted[:, :1] + (painted[:, 1:] - painted[:, :1]) * [0.2, 0.5, 0.8]).ravel()
            inside = inside[(inside > 0.1) & (inside < length - 0.1)]
            paint = covered(ground, along(row["points"], sub["offset"], inside))[:, channel]
            assert paint.min() > 0.4 and np.median(paint) > 0.5, row["type"]
            gaps = (painted[1:, 0] + painted[:-1, 1]) / 2
            if len(gaps):
                paint = covered(ground, along(row["points"], sub["offset"], gaps))[:, channel]
                assert (paint < 0.2).mean() > 0.7  # the lines between slots end there
            middle = painted.mean(axis=1)
            middle = middle[(middle > 0.1) & (middle < length - 0.1)]
            for side in (-1, 1) if not sub["offset"] else (np.sign(sub["offset"]),):
                edge = along(row["points"], sub["offset"] + side * (sub["width"] / 2 + 0.12), middle)
                if row["role"] != "edge":
                    assert np.median(covered(ground, edge)[:, channel]) < 0.3
    assert {row["type"] for row in record["lines"]} == set(LINE_TYPES) or record["lines"][0]["town"].startswith("park")


def test_all_paint_is_recorded(record, ground, town):
    """Paint on the asphalt lies in a record, but for the lines between parking slots and the bands at bumps."""
    known = [Polygon(bar) for row in record["crossings"] for bar in row["bars"]]
    known += [Polygon(row["polygon"]) for row in record["stop_lines"]]
    known += [Polygon(polygon) for row in record["signs"] for polygon in row["polygons"]]
    known += [Polygon(row["polygon"]).boundary.buffer(0.15) for row in record["parking_slots"]]
    known += [LineString(row["points"]).buffer(0.4) for row in record["lines"]]
    for row in record["speed_bumps"]:
        c, s = np.cos(row["yaw"]), np.sin(row["yaw"])
        across = np.array([-s, c]) * row["size"][1] / 2
        known.append(LineString([row["center"] - across, row["center"] + across]).buffer(row["size"][0] / 2 + 0.6))
    area = unary_union(known).buffer(0.15)
    road = unary_union([Polygon(p) for p in town.town.junctions]).union(
        unary_union([Polygon(r.strip(0, r.length, -r.half + 0.4, r.half - 0.4)) for r in town.town.roads])
    )
    rng = np.random.default_rng(0)
    low, high = town.town.nodes.min(0), town.town.nodes.max(0)
    points = rng.uniform(low, high, (400_000, 2))
    points = points[within(road.buffer(-0.3), points)]
    painted = covered(ground, points)[:, [WHITE, YELLOW]].max(axis=1) > 0.9
    assert painted.sum() > 500
    strange = points[painted & ~within(area, points)]
    assert len(strange) == 0, strange[:5]


def test_the_drivable_area_is_the_asphalt_and_has_no_holes(expansion, ground, town):
    area = unary_union(polygons_of(expansion, "road_segment") + polygons_of(expansion, "lane"))
    assert area.geom_type == "Polygon"
    assert min(Polygon(ring).area for ring in area.interiors) > 300
    rng = np.random.default_rng(0)
    points = rng.uniform(town.town.nodes.min(0) - 20, town.town.nodes.max(0) + 20, (100_000, 2))
    asphalt = covered(ground, points)[:, ROAD]
    inside = within(area, points)
    near_edge = within(area.boundary.buffer(0.15), points)
    assert ((asphalt > 0.5) == inside)[~near_edge].all() and inside.mean() > 0.1


def test_lanes_dividers_and_crossings_agree(expansion, record):
    nodes = {row["token"]: (row["x"], row["y"]) for row in expansion["node"]}
    lines = {row["token"]: [nodes[n] for n in row["node_tokens"]] for row in expansion["line"]}
    dividers = [LineString(lines[row["line_token"]]) for row in expansion["lane_divider"] + expansion["road_divider"]]
    assert len(dividers) == len(record["lines"])
    drawn = unary_union([LineString(row["points"]) for row in record["lines"]])
    assert all(line.hausdorff_distance(drawn.intersection(line.buffer(0.05))) < 0.06 for line in dividers)
    sides = unary_union([polygon.boundary for polygon in polygons_of(expansion, "lane")]).buffer(0.05)
    assert all(sides.covers(line) for line in dividers)
    kinds = {s["segment_type"] for row in expansion["lane_divider"] for s in row["lane_divider_segments"]}
    words = {"NIL", "SINGLE_SOLID_WHITE", "SINGLE_SOLID_YELLOW", "DOUBLE_SOLID_WHITE", "DOUBLE_DASHED_WHITE"}
    assert kinds <= words and "SINGLE_SOLID_WHITE" in kinds
    for polygon, row in zip(polygons_of(expansion, "ped_crossing"), record["crossings"], strict=True):
        assert polygon.buffer(0.02).covers(unary_union([Polygon(bar) for bar in row["bars"]]))
    for polygon, row in zip(polygons_of(expansion, "stop_line"), record["stop_lines"], strict=True):
        assert polygon.symmetric_difference(Polygon(row["polygon"])).area < 0.01


def test_arrows_point_where_their_lanes_lead(town, record):
    for sign, row in zip(town.markings.signs, record["signs"], strict=True):
        road = town.town.roads[sign.road]
        box = shapely.affinity.rotate(
            shapely.box(*(-np.array(row["size"]) / 2), *(np.array(row["size"]) / 2)), row["yaw"], (0, 0), True
        )
        paint = unary_union([Polygon(p) for p in row["polygons"]])
        assert shapely.affinity.translate(box, *row["center"]).buffer(0.01).covers(paint)
        if sign.kind == "diamond":
            continue
        lane = min(
            (lane for lane in town.town.lanes if lane.road == sign.road and lane.direction == sign.direction),
            key=lambda lane: abs(-lane.direction * (lane.index + 0.5) * road.lane - sign.t),
        )
        turns = {town.town.connectors[number].turn for number in lane.following}
        assert set(row["kind"].split("_")[1:]) == turns
        end = lane.points[-1] - row["center"]
        assert end @ [np.cos(row["yaw"]), np.sin(row["yaw"])] > 0.95 * np.hypot(*end)


def test_parked_cars_stand_in_slots(town, record):
    slots = unary_union([Polygon(row["polygon"]) for row in record["parking_slots"]]).buffer(0.35)
    parked = [a for a in town.actors if a.parked and a.category == "vehicle.car"]
    assert len(parked) > 10
    outside = [a for a in parked if not slots.covers(shapely.Point(a.motion.at(0)[:2]))]
    assert len(outside) <= 1  # one may have been put beside a road without slots, to be seen
    for row in record["parking_slots"]:
        polygon = Polygon(row["polygon"])
        assert polygon.area == pytest.approx(np.prod(row["size"]), rel=0.05)
        assert np.hypot(*(np.array(polygon.centroid.coords[0]) - row["center"])) < 0.15


def test_solids_and_bumps_are_where_the_lidar_meets_them(world, rows):
    """Returns from above the ground and outside every box come from recorded solids; bumps are low and there."""
    import rigfuse.train.world.check_contents as contents

    assert contents.CLEAR < 0.5  # the rule itself is applied to the world by the checker; here the reverse
    poses = {row["token"]: row for row in rows("ego_pose")}
    mounts = {row["token"]: row for row in rows("calibrated_sensor")}
    for log in rows("log"):
        content = json.loads((world / "maps" / "markings" / f"{log['location']}.json").read_text())
        points = []
        for row in rows("sample_data"):
            if "LIDAR" in row["filename"] and log["logfile"] in row["filename"]:
                scan = np.fromfile(world / row["filename"], np.float32).reshape(-1, 5)[:, :3]
                pose = from_row(poses[row["ego_pose_token"]]) @ from_row(mounts[row["calibrated_sensor_token"]])
                points.append(scan @ pose[:3, :3].T + pose[:3, 3])
        points = np.concatenate(points)
        rows_here = [row for row in content["solids"] if row["town"] == log["town"]]
        outlines = [Polygon(row["outline"]) for row in rows_here]
        heights = np.array([row["height"] for row in rows_here])
        assert all(o.buffer(0.01).covers(Polygon(row["footprint"])) for o, row in zip(outlines, rows_here))
        point, solid = shapely.STRtree([outline.buffer(0.05) for outline in outlines]).query(
            shapely.points(points[:, :2]), predicate="within"
        )
        highest = np.zeros(len(points))
        np.maximum.at(highest, point, heights[solid])
        inside = np.unique(point)
        assert (points[inside, 2] < highest[inside] + 0.01).all()
        counts = np.bincount(solid[points[point, 2] > 0.5], minlength=len(outlines))
        met = [row["kind"] for row, count in zip(rows_here, counts) if count > 20]
        assert met.count("building") >= 5 and "tree" in met and "lamp" in met


def test_a_bump_is_solid_and_as_high_as_recorded(town, record):
    from rigfuse.modules.poses import rigid
    from rigfuse.train.world.casting import Scanner, cast

    assert record["speed_bumps"]
    for row in record["speed_bumps"][:3]:
        way = np.array([np.cos(row["yaw"]), np.sin(row["yaw"])])
        origin = np.array([*(row["center"] - 6 * way), 1.8])
        view = Scanner(rigid(np.eye(3), origin), np.radians(np.linspace(-30, -8, 300)), 360)
        hits = cast(view, town.scenery, 0)
        points = view.local / np.maximum(hits.inverse, 1e-9)[..., None] + origin
        offset = (points[..., :2] - row["center"]) @ np.array([way, [-way[1], way[0]]]).T
        on_it = (np.abs(offset[..., 0]) < row["size"][0] / 5) & (np.abs(offset[..., 1]) < row["size"][1] / 2 - 0.2)
        assert on_it.sum() > 5
        heights = points[..., 2][on_it & (hits.face >= 0)]
        assert np.median(heights) == pytest.approx(row["height"], abs=0.01)


def stripes_and_gaps(content, town):
    """Areas painted with broad lines and crossing bars, and the asphalt close beside them."""
    lines, crossings = ([row for row in content[layer] if row["town"] == town] for layer in ("lines", "crossings"))
    solid = [row for row in lines if row["type"] in ("WideSolidLine", "SolidLine")]
    painted = [LineString(row["points"]).buffer(row["sublines"][0]["width"] / 2 - 0.03) for row in solid]
    painted = unary_union(painted + [Polygon(bar).buffer(-0.03) for row in crossings for bar in row["bars"]])
    other = unary_union([LineString(row["points"]).buffer(0.4) for row in lines])
    return painted, painted.buffer(0.8).difference(painted.buffer(0.15)).difference(other)


def test_pictures_show_the_paint_where_the_map_has_it(world, rows):
    """Brightness of the pixels whose ground point, by the depth on disk, is on paint, against those close beside it."""
    poses = {row["token"]: row for row in rows("ego_pose")}
    mounts = {row["token"]: row for row in rows("calibrated_sensor")}
    areas = {}
    for log in rows("log"):
        content = json.loads((world / "maps" / "markings" / f"{log['location']}.json").read_text())
        areas[log["logfile"]] = stripes_and_gaps(content, log["town"])
    on, off = [], []
    for row in (row for row in rows("sample_data") if row["width"]):
        painted, bare = areas[row["filename"].split("/")[2].split("__")[0]]
        mounted = mounts[row["calibrated_sensor_token"]]
        pose = from_row(poses[row["ego_pose_token"]]) @ from_row(mounted)
        view = Pinhole(pose, np.array(mounted["camera_intrinsic"]), row["width"], row["height"])
        depth = read_depth(world / depth_name(row["filename"])).ravel()
        near = np.flatnonzero((depth > 0) & (depth < 14))
        points = view.origin[:, None] + view.directions(near) * depth[near]
        on_ground = np.abs(points[2]) < 0.03
        grey = np.asarray(Image.open(world / row["filename"]).convert("L")).ravel()[near[on_ground]]
        on.append(grey[within(painted, points[:2, on_ground].T)])
        off.append(grey[within(bare, points[:2, on_ground].T)])
    on, off = np.concatenate(on), np.concatenate(off)
    assert len(on) > 100 and np.median(on) > np.median(off) + 40
