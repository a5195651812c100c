"""The generated world: its pictures against geometry, its files against nuScenes' rules and the official evaluation."""

import json
import os
import shutil
import warnings
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rigfuse.train.data.poses import from_row, inverse, rigid, rotation_xyz, to_quaternion, to_rotation
from rigfuse.train.tools.make_world import main
from rigfuse.train.world import WorldSettings, check_world, draw_over, make_world, read_depth
from rigfuse.train.world.casting import Pinhole, Placed, cast
from rigfuse.train.world.scene import Scene
from rigfuse.train.world.sensors import default_cameras
from rigfuse.train.world.shading import picture
from rigfuse.train.world.solids import Body, Look, ball, box, cylinder

SETTINGS = WorldSettings(scenes=2, samples=3, width=320)
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # world_R_cam of a camera that looks along x


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "made"
    make_world(root, SETTINGS, workers=0)
    return root


@pytest.fixture
def altered(world, tmp_path):
    """A copy to break. Files are linked, so what is changed has to be unlinked first: see `rewrite`."""
    return shutil.copytree(world, tmp_path / "altered", copy_function=os.link)


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))


def rows(root, table):
    return json.loads((root / "v1.0-mini" / f"{table}.json").read_text())


@pytest.mark.parametrize("seed", range(4))
def test_quaternions_and_rotations_are_inverse(seed):
    rotation = rotation_xyz(*np.random.default_rng(seed).uniform(-3, 3, 3))
    np.testing.assert_allclose(to_rotation(to_quaternion(rotation)), rotation, atol=1e-12)


def pinhole(height=1.5):
    return Pinhole(rigid(AHEAD, [0, 0, height]), np.array([[200.0, 0, 160.25], [0, 200, 90.25], [0, 0, 1]]), 321, 181)


def test_depth_of_ground_and_box_is_exact():
    solid = Body([box((-1, 1), (-2, 2), (-1, 1), Look((0.5, 0.5, 0.5)))], (4, 2, 2))
    hits = cast(pinhole(), [Placed(solid, np.eye(3), np.array([11.0, 0, 1]), owner=0)], 1)
    depth = 1 / np.maximum(hits.inverse, 1e-9)
    assert depth[90, 160] == pytest.approx(10, rel=1e-6)
    assert depth[130, 20] == pytest.approx(1.5 * 200 / (130 - 90.25), rel=1e-6)  # height · focal / rows down
    assert hits.inverse[40, 160] == 0
    # The near face is 4 m wide and 2 m tall at 10 m: columns 120.25 to 200.25, rows 80.25 to 120.25.
    assert hits.visible[0] == hits.alone[0] == 80 * 40
    assert (hits.face[81:121, 121:201] >= 0).all()


def test_rays_meet_solids_where_a_brute_force_walk_does():
    look = Look((0.5, 0.5, 0.5))
    parts = [cylinder(1, (0.3, 0, 0.2), 0.8, 1.1, look, sides=7), ball((-0.5, 0.4, -0.3), (0.7, 0.5, 0.9), look)]
    rotation = rotation_xyz(0.3, -0.4, 1.1)
    position = np.array([5.0, 0.4, 1.7])
    hits = cast(pinhole(), [Placed(Body(parts, (3, 3, 3)), rotation, position, owner=0)], 1)
    steps = np.arange(2.0, 8.0, 0.002)
    view = pinhole()
    for row, column in np.random.default_rng(0).integers([30, 60], [150, 260], (60, 2)):
        ray = view.directions(np.array([row * 321 + column]))[:, 0].astype(float)
        points = (view.origin + steps[:, None] * ray - position) @ rotation
        inside = [((points @ part.normals.T) <= part.offsets).all(axis=1) for part in parts]
        first = np.flatnonzero(np.logical_or(*inside))
        found = hits.face[row, column] >= 0
        assert found == bool(len(first))
        if found:
            assert 1 / hits.inverse[row, column] == pytest.approx(steps[first[0]], abs=0.003)


def test_scaled_cameras_keep_the_corner_of_the_picture():
    full, half = default_cameras(1600)[0].intrinsics, default_cameras(800)[0].intrinsics
    point = np.array([0.3, -0.2, 1.0])
    np.testing.assert_allclose((half @ point)[:2], ((full @ point)[:2] + 0.5) / 2 - 0.5)


@pytest.fixture(scope="session")
def scene():
    return Scene(seed=0, index=0, samples=3)


def view_of(scene, name, t=0.0):
    camera = {camera.name: camera for camera in default_cameras(640)}[name]
    return Pinhole(scene.ego_pose(t) @ camera.ego_T_cam, camera.intrinsics, camera.width, camera.height)


def project(points, cam_T_world, intrinsics):
    local = cam_T_world[:3, :3] @ points + cam_T_world[:3, 3:]
    pixels = intrinsics @ local
    return np.rint(pixels[:2] / np.maximum(pixels[2], 1e-6)).astype(int), local[2]


def test_corners_of_bodies_are_as_deep_as_the_depth_says(scene):
    total = shown = 0
    for camera in default_cameras(640):
        world_T_cam = scene.ego_pose(0) @ camera.ego_T_cam
        view = Pinhole(world_T_cam, camera.intrinsics, camera.width, camera.height)
        depth = 1 / np.maximum(cast(view, scene.bodies(0), len(scene.actors)).inverse, 1e-6)
        for actor in scene.actors:
            if not actor.category.startswith(("vehicle.car", "vehicle.truck", "vehicle.bus", "vehicle.trailer")):
                continue  # the others are thinner than a pixel is wide
            rotation, centre = actor.pose(0)
            corners = actor.body.solids[0].vertices
            corners = (corners + 0.2 * (corners.mean(0) - corners)).T  # inside by more than a pixel
            (u, v), z = project(rotation @ corners + centre[:, None], inverse(world_T_cam), camera.intrinsics)
            kept = (z > 2) & (z < 40) & (u >= 0) & (v >= 0) & (u < camera.width) & (v < camera.height)
            gap = z[kept] - depth[v[kept], u[kept]]
            assert (gap > -0.35).all(), f"{actor.category} is seen through"
            total, shown = total + len(gap), shown + (gap < 0.35).sum()
    assert total > 100 and shown > 0.15 * total


@pytest.mark.parametrize("other, later", [("CAM_FRONT_LEFT", 0.0), ("CAM_FRONT", 0.5)])
def test_a_surface_has_one_colour_in_two_pictures(scene, other, later):
    scenery = scene.town.scenery + [item for item in scene.bodies(0) if scene.actors[item.owner].parked]
    views = [view_of(scene, "CAM_FRONT"), view_of(scene, other, later)]
    hits = [cast(view, scenery, len(scene.actors)) for view in views]
    pictures = [picture(v, h, scene.ground, scene.light, []).astype(float) for v, h in zip(views, hits)]
    flat = np.flatnonzero((hits[0].inverse > 1 / 40).ravel())[::7]
    depth = 1 / hits[0].inverse.ravel()[flat]
    camera = {camera.name: camera for camera in default_cameras(640)}[other]
    cam_T_world = inverse(scene.ego_pose(later) @ camera.ego_T_cam)

    def difference(scale):
        points = views[0].origin[:, None] + views[0].directions(flat) * (depth * scale)
        (u, v), z = project(points, cam_T_world, camera.intrinsics)
        inside = (u >= 0) & (v >= 0) & (u < camera.width) & (v < camera.height) & (z > 1)
        there = 1 / np.maximum(hits[1].inverse[v[inside], u[inside]], 1e-6)
        same = np.abs(there - z[inside]) < 0.02 * z[inside] if scale == 1 else np.ones(len(there), bool)
        mine = pictures[0].reshape(-1, 3)[flat[inside]][same]
        assert len(mine) > 300
        return np.abs(mine - pictures[1][v[inside], u[inside]][same]).mean()

    assert difference(1.0) < 7 and difference(1.0) < 0.4 * difference(1.3)


def test_a_made_world_keeps_the_rules(world):
    assert check_world(world) == []


@pytest.mark.parametrize("channel", ["CAM_FRONT_LEFT", "CAM_BACK"])
def test_depth_on_disk_is_that_of_the_tables_pose_calibration_and_time(world, scene, channel):
    tables = {name: {row["token"]: row for row in rows(world, name)} for name in ("ego_pose", "calibrated_sensor")}
    for row in [row for row in rows(world, "sample_data") if f"/{channel}/world-0-0000" in row["filename"]]:
        calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
        world_T_cam = from_row(tables["ego_pose"][row["ego_pose_token"]]) @ from_row(calibration)
        view = Pinhole(world_T_cam, np.array(calibration["camera_intrinsic"]), row["width"], row["height"])
        seconds = (row["timestamp"] - 1_600_000_000_000_000) / 1e6
        inverse_depth = cast(view, scene.bodies(seconds), len(scene.actors)).inverse
        expected = np.where(inverse_depth > 1 / 255, 1 / np.maximum(inverse_depth, 1e-6), 0)
        written = read_depth(world / "depth" / channel / Path(row["filename"]).with_suffix(".png").name)
        off = np.abs(written - expected) > 0.003 + 1e-4 * expected
        assert off.mean() < 1e-4  # a pixel on an outline may fall to either side


def shift_first(table, **changes):
    def change(root):
        content = rows(root, table)
        content[1].update(changes)
        rewrite(root / "v1.0-mini" / f"{table}.json", content)

    return change


def swap_times(root):
    content = rows(root, "sample")
    content[0]["timestamp"], content[1]["timestamp"] = content[1]["timestamp"], content[0]["timestamp"]
    rewrite(root / "v1.0-mini" / "sample.json", content)


def drop_row(root):
    content = rows(root, "sample_data")
    removed = next(row for row in content if row["is_key_frame"] and not row["prev"] and row["width"])
    content.remove(removed)
    for row in content:
        row["prev"] = "" if row["prev"] == removed["token"] else row["prev"]
    rewrite(root / "v1.0-mini" / "sample_data.json", content)


def change_first_vehicle(root, change):
    """Changes the first annotation of a parked vehicle that has a next one."""
    parked = next(row["token"] for row in rows(root, "attribute") if row["name"] == "vehicle.parked")
    content = rows(root, "sample_annotation")
    change(next(row for row in content if parked in row["attribute_tokens"] and row["next"]))
    rewrite(root / "v1.0-mini" / "sample_annotation.json", content)


def push(row):
    row["translation"][0] += 1.0


def first_file(root, pattern):
    return sorted(root.glob(pattern))[0]


def shrink_picture(root):
    path = first_file(root, "samples/CAM_BACK/*.jpg")
    path.unlink()
    Image.new("RGB", (100, 50)).save(path)


def stretch_depth(root):
    path = first_file(root, "depth/CAM_BACK/*.png")
    depth = (read_depth(path) * 1.3 * 256).astype(np.uint16)
    path.unlink()
    Image.fromarray(depth).save(path)


def thin_scan(root):
    path = first_file(root, "samples/LIDAR_TOP/*.bin")
    rewrite(path, np.fromfile(path, np.float32).reshape(-1, 5)[::2].tobytes())


BREAKS = {
    "tables": lambda root: (root / "v1.0-mini" / "log.json").unlink(),
    "unique tokens": lambda root: shift_first("sensor", token=rows(root, "sensor")[0]["token"])(root),
    "foreign keys": shift_first("sample_data", ego_pose_token="nothing"),
    "chains": shift_first("sample", prev=""),
    "times increase": swap_times,
    "pose times": shift_first("ego_pose", timestamp=17),
    "key frames": drop_row,
    "unit quaternions": shift_first("ego_pose", rotation=[1.0, 0.1, 0.0, 0.0]),
    "box sizes": shift_first("sample_annotation", size=[1.0, -1.0, 1.0]),
    "intrinsics": shift_first("calibrated_sensor", camera_intrinsic=[[1, 0, -5], [0, 1, 5], [0, 0, 1]]),
    "attributes": lambda root: change_first_vehicle(root, lambda row: row["attribute_tokens"].clear()),
    "velocities": lambda root: change_first_vehicle(root, push),
    "files": lambda root: first_file(root, "samples/CAM_FRONT/*.jpg").unlink(),
    "picture sizes": shrink_picture,
    "splits": lambda root: rewrite(root / "v1.0-mini" / "splits.json", {"world_all": ["world-0009"]}),
    "LiDAR counts": thin_scan,
    "depth": stretch_depth,
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_checker_names_the_rule_that_is_broken(rule, altered):
    BREAKS[rule](altered)
    problems = check_world(altered)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems
    assert main(["--check", str(altered)]) == 1


def test_a_scene_is_the_same_in_another_process_and_a_smaller_world(world, tmp_path):
    settings = WorldSettings(scenes=1, samples=SETTINGS.samples, width=SETTINGS.width)
    make_world(tmp_path / "again", settings, workers=1)

    def sums(root):
        names = [path for folder in ("samples", "sweeps", "depth", "maps") for path in (root / folder).rglob("*.*")]
        return {str(path.relative_to(root)): md5(path.read_bytes()).hexdigest() for path in names}

    again = sums(tmp_path / "again")
    assert len(again) > 40 and again.items() <= sums(world).items()
    kept = {row["token"]: row for row in rows(world, "sample_annotation")}
    assert all(kept[row["token"]] == row for row in rows(tmp_path / "again", "sample_annotation"))


def test_nothing_half_made_is_left(tmp_path):
    def stop(done, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        make_world(tmp_path / "out", WorldSettings(scenes=1, samples=1, width=64), workers=0, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def nusc(world):
    return pytest.importorskip("nuscenes").NuScenes("v1.0-mini", str(world), verbose=False)


def test_the_devkit_reads_sensors_boxes_and_map(nusc, world):
    from nuscenes.map_expansion.map_api import NuScenesMap
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    for sample in nusc.sample:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        for found in boxes:
            row = nusc.get("sample_annotation", found.token)
            assert points_in_box(found, points).sum() == row["num_lidar_pts"]
    log = nusc.get("log", nusc.scene[0]["log_token"])
    place = NuScenesMap(str(world), log["location"])
    first = nusc.get("sample_data", nusc.sample[0]["data"]["LIDAR_TOP"])
    x, y = nusc.get("ego_pose", first["ego_pose_token"])["translation"][:2]
    assert place.layers_on_point(x, y)["drivable_area"] and place.layers_on_point(x, y)["lane"]
    assert nusc.map[0]["mask"].is_on_mask(np.array([x]), np.array([y])).all()
    lane = place.get_closest_lane(x, y, radius=3)
    assert place.get_outgoing_lane_ids(lane)
    assert np.hypot(*(np.array(place.discretize_lanes([lane], 0.5)[lane])[:, :2] - [x, y]).T).min() < 0.6


def submission(nusc, path, task, empty_too):
    """The ground truth as predictions, with or without the boxes no LiDAR point is in."""
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.eval.tracking.utils import category_to_tracking_name

    results = {sample["token"]: [] for sample in nusc.sample}
    rename = category_to_detection_name if task == "detection" else category_to_tracking_name
    for row in nusc.sample_annotation:
        name = rename(row["category_name"])
        if name is None or (row["num_lidar_pts"] == 0 and not empty_too):
            continue
        attributes = [nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]]
        extra = {"attribute_name": "".join(attributes)}
        if task == "tracking":
            extra = {"tracking_id": row["instance_token"]}
        results[row["sample_token"]].append(
            {
                **{key: row[key] for key in ("sample_token", "translation", "size", "rotation")},
                "velocity": nusc.box_velocity(row["token"])[:2].tolist(),
                f"{task}_name": name,
                f"{task}_score": 1.0,
                **extra,
            }
        )
    meta = dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), False)
    path.write_text(json.dumps({"meta": meta, "results": results}))
    return str(path)


@pytest.mark.parametrize("empty_too", [False, True])
def test_official_detection_scores_of_the_ground_truth(nusc, tmp_path, empty_too):
    """Perfect, because every drive has all ten classes; boxes without returns count as false."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    config, file = config_factory("detection_cvpr_2019"), submission(nusc, tmp_path / "d.json", "detection", empty_too)
    for split in ("world_all", "world_val"):
        evaluation = DetectionEval(nusc, config, file, split, str(tmp_path / "out"), verbose=False)
        metrics = evaluation.evaluate()[0].serialize()
        errors = np.array(list(metrics["tp_errors"].values()))
        np.testing.assert_allclose(errors, 0, atol=1e-6)
        if empty_too:
            assert 0.7 < metrics["mean_ap"] < 0.9999
        else:
            assert metrics["mean_ap"] == pytest.approx(1) and metrics["nd_score"] == pytest.approx(1)


def test_official_tracking_scores_of_the_ground_truth(nusc, world, tmp_path):
    pytest.importorskip("motmetrics")
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.tracking.evaluate import TrackingEval

    file = submission(nusc, tmp_path / "t.json", "tracking", empty_too=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # motmetrics divides by zero where a threshold is not reached
        config = config_factory("tracking_nips_2019")
        where = str(tmp_path / "out"), "v1.0-mini", str(world)
        evaluation = TrackingEval(config, file, "world_all", *where, verbose=False)
        metrics = evaluation.evaluate()[0].serialize()
    assert metrics["amota"] == pytest.approx(1) and metrics["ids"] == 0


@pytest.fixture(scope="session")
def over(tmp_path_factory, nuscenes_root):
    out = tmp_path_factory.mktemp("over") / "drawn"
    draw_over(nuscenes_root, out, scenes=["scene-0061"], samples=2, workers=0)
    return out


def test_missing_pictures_are_drawn_over_real_geometry(over, nuscenes_root):
    provenance = json.loads((over / "provenance.json").read_text())
    assert len(provenance["real"]) == 24 and len(provenance["drawn"]) == 6
    assert len(provenance["absent"]) == 404 * 6 - 30
    for name in provenance["real"]:
        assert (over / name).read_bytes() == (nuscenes_root / name).read_bytes()
    for name in provenance["drawn"]:
        with Image.open(over / name) as image:
            assert image.size == (1600, 900) and np.asarray(image).std() > 25


def test_drawn_boxes_stand_where_they_are_annotated(over):
    nusc = pytest.importorskip("nuscenes").NuScenes("v1.0-mini", str(over), verbose=False)
    sample = nusc.get("sample", nusc.get("sample", nusc.scene[0]["first_sample_token"])["next"])
    checked = 0
    for channel in ("CAM_FRONT", "CAM_FRONT_RIGHT"):
        row = nusc.get("sample_data", sample["data"][channel])
        depth = read_depth(over / "depth" / channel / Path(row["filename"]).with_suffix(".png").name)
        _, boxes, intrinsics = nusc.get_sample_data(row["token"])
        for found in boxes:
            still = np.linalg.norm(nusc.box_velocity(found.token)) < 0.1
            if still and 5 < found.center[2] < 30 and found.name.startswith(("vehicle.car", "movable_object.barrier")):
                u, v = np.rint((intrinsics @ found.center)[:2] / found.center[2]).astype(int)
                if 0 <= u < 1600 and 0 <= v < 900:
                    assert depth[v, u] < found.center[2] + 0.2, found.name
                    checked += abs(depth[v, u] - found.center[2]) < max(found.wlh) / 2 + 0.1
    assert checked >= 5


def test_the_command_explains_itself_and_refuses_in_one_line(world, capsys, tmp_path):
    def refused(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        message = capsys.readouterr().err
        assert code == 2 and message.count("\n") == 1, message
        return message

    assert "did you mean '--scenes'" in refused("--out", tmp_path / "a", "--scnes", 3)
    assert "not an empty folder" in refused("--out", world, "--scenes", 1)
    assert "--out" in refused("--scenes", 3)
    assert "--seed" in refused("--over", world, "--out", tmp_path / "a", "--seed", 3)
    assert "multiple of 16" in refused("--out", tmp_path / "a", "--width", 333)
    assert "no folder in it (like v1.0-mini) has the tables" in refused("--over", tmp_path, "--out", tmp_path / "a")
    assert "choose from world-0000" in refused("--over", world, "--out", tmp_path / "a", "--only", "scene-x")
    assert main(["--check", str(world)]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--over ROOT --out FOLDER" in capsys.readouterr().out
