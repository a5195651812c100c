"""The generated world's files against nuScenes' rules, the devkit and the official evaluation."""

import json
import warnings
from dataclasses import replace
from hashlib import md5

import numpy as np
import pytest
from PIL import Image

from rigfuse.train.tools.make_world import main
from rigfuse.train.world import WorldSettings, check_world, make_world, read_depth


def rows(root, table):
    return json.loads((root / "v1.0-mini" / f"{table}.json").read_text())


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))


def test_a_made_world_keeps_the_rules(world):
    assert check_world(world) == []


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


def move_all(root):
    """Moves every box by a metre: its instance is consistent, the world is not."""
    content = rows(root, "sample_annotation")
    for row in content:
        row["translation"][1] += 1.0
        row["num_lidar_pts"] = 0
    rewrite(root / "v1.0-mini" / "sample_annotation.json", content)


def turn_round(root):
    """Turns the moving vehicles by a quarter."""
    content = rows(root, "sample_annotation")
    moving = next(row["token"] for row in rows(root, "attribute") if row["name"] == "vehicle.moving")
    for row in content:
        if moving in row["attribute_tokens"]:
            w, _, _, z = row["rotation"]
            row["rotation"] = [(w - z) / 2**0.5, 0.0, 0.0, (w + z) / 2**0.5]
    rewrite(root / "v1.0-mini" / "sample_annotation.json", content)


def share_town(root):
    content = rows(root, "log")
    for row in content:
        row["town"] = content[0]["town"]
    rewrite(root / "v1.0-mini" / "log.json", content)


def change_map(root, folder, change):
    path = first_file(root, f"maps/{folder}/*.json")
    content = json.loads(path.read_text())
    change(content)
    rewrite(path, content)


def shrink_junction(content):
    """Pulls one corner of a junction in, which leaves a slit between it and a road."""
    segment = next(row for row in content["road_segment"] if row["is_intersection"])
    polygon = next(row for row in content["polygon"] if row["token"] == segment["polygon_token"])
    nodes = {row["token"]: row for row in content["node"]}
    corners = [nodes[token] for token in polygon["exterior_node_tokens"]]
    middle = {axis: sum(node[axis] for node in corners) / len(corners) for axis in "xy"}
    for node in corners:
        for axis in "xy":
            node[axis] += 0.02 * (middle[axis] - node[axis])


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
    "towns": share_town,
    "drivable area": lambda root: change_map(root, "expansion", shrink_junction),
    "markings": lambda root: change_map(root, "markings", lambda content: content["lines"][0].pop("sublines")),
    "LiDAR counts": thin_scan,
    "boxes": move_all,
    "headings": turn_round,
    "depth": stretch_depth,
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_checker_names_the_rule_that_is_broken(rule, altered):
    BREAKS[rule](altered)
    problems = check_world(altered)
    assert any(problem.startswith(f"{rule}: ") for problem in problems), problems
    assert main(["--check", str(altered)]) == 1


def test_a_scene_is_the_same_in_another_process_and_a_smaller_world(world, settings, tmp_path):
    make_world(tmp_path / "again", replace(settings, scenes=1), workers=1)

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
