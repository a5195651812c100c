"""Roots of other vehicles: the rig is what the tables say, whatever its number and names."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rigfuse.modules.detection.boxes import Detections
from rigfuse.modules.rig import NUSCENES_CAMERAS, ImageAugmentation, RigFrame
from rigfuse.train.data import open_drives
from rigfuse.train.data.files import BadFile
from rigfuse.train.data.images import camera_image
from rigfuse.train.data.nuscenes import open_nuscenes, reference_row
from rigfuse.train.data.splits import drives_of_splits, split_names
from rigfuse.train.metrics.detection import evaluate_detection, write_results
from rigfuse.train.metrics.tracking import TrackingMetric
from support.roots import VERSION, copy_root, edit, read_table, without_channels

OTHER_NAMES = dict(zip(NUSCENES_CAMERAS, ("wide", "port", "starboard", "aft_port", "aft_starboard", "aft")))


@pytest.fixture
def root(small_world, tmp_path):
    return copy_root(small_world, tmp_path / "root")


def rows_of(root, channel, sample):
    """Rows of sample_data of one sensor at one sample, key frame or not."""
    sensor = next(row["token"] for row in read_table(root, "sensor") if row["channel"] == channel)
    mounted = {row["token"] for row in read_table(root, "calibrated_sensor") if row["sensor_token"] == sensor}
    rows = read_table(root, "sample_data")
    return [row for row in rows if row["calibrated_sensor_token"] in mounted and row["sample_token"] == sample]


def cut_out(root, channel, sample):
    """Removes a sensor's rows at one sample; the chain goes on in two parts."""
    gone = {row["token"] for row in rows_of(root, channel, sample)}

    def change(rows):
        for row in rows:
            row.update({end: "" for end in ("prev", "next") if row[end] in gone})
        return [row for row in rows if row["token"] not in gone]

    edit(root, "sample_data", change)
    assert gone


def rename(root, names):
    def change(rows):
        for row in rows:
            row["channel"] = names.get(row["channel"], row["channel"])

    edit(root, "sensor", change)


def config(root, **changes):
    return SimpleNamespace(**dict(root=str(root), version=None, train_split=None, val_split=None) | changes)


def test_three_real_cameras(ddad_root, ddad, tmp_path):
    root = copy_root(ddad_root, tmp_path / "root")
    without_channels(root, "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
    kept = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT")
    (drive,) = open_drives(root)
    for moment, whole in zip(drive, ddad[0], strict=True):
        assert moment.rig.names == kept and moment.frame.image_T_ego.shape == (1, 3, 4, 4)
        for name in kept:
            torch.testing.assert_close(moment.rig[name].image_T_ego, whole.rig[name].image_T_ego, rtol=0, atol=0)
    assert torch.equal(drive[0].image("CAM_BACK_LEFT"), ddad[0][0].image("CAM_BACK_LEFT"))


def test_other_names(root, small_world):
    rename(root, OTHER_NAMES | {"LIDAR_TOP": "roof"})
    for drive, same in zip(open_drives(root), open_drives(small_world), strict=True):
        for moment, known in zip(drive, same, strict=True):
            assert moment.rig.names == tuple(sorted(OTHER_NAMES.values())) and moment.lidars == ("roof",)
            assert torch.equal(moment.world_T_ego, known.world_T_ego)
            for name, other in OTHER_NAMES.items():
                assert torch.equal(moment.rig[other].image_T_ego, known.rig[name].image_T_ego)
                assert torch.equal(moment.image(other), known.image(name))
            assert torch.equal(moment.points(3), known.points(3))


def test_known_names_come_in_their_order_before_others(root):
    rename(root, {"CAM_FRONT_LEFT": "A_CAMERA", "CAM_FRONT_RIGHT": "Z_CAMERA"})
    names = open_drives(root)[0][0].rig.names
    assert names == ("CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT", "CAM_BACK", "A_CAMERA", "Z_CAMERA")


def test_whose_pose_a_sample_has():
    """(channel, kind, time) of the sensors of a sample at time 100, the one that counts first."""
    cases = [
        [("LIDAR_TOP", "lidar", 190), ("LIDAR_A", "lidar", 100), ("CAM_FRONT", "camera", 100)],
        [("roof", "lidar", 120), ("bumper", "lidar", 150), ("CAM_FRONT", "camera", 100), ("RADAR", "radar", 100)],
        [("CAM_BACK", "camera", 101), ("CAM_FRONT", "camera", 98)],
        [("CAM_BACK", "camera", 101), ("CAM_FRONT", "camera", 99)],  # equally near: the alphabet decides
    ]
    for case in cases:
        rows = [dict(channel=name, sensor_modality=kind, timestamp=time) for name, kind, time in case]
        nusc = SimpleNamespace(get=lambda table, token: rows[token])
        for order in (range(len(rows)), range(len(rows))[::-1]):
            sample = dict(timestamp=100, data={rows[number]["channel"]: number for number in order})
            assert reference_row(nusc, sample) is rows[0]


def test_without_lidar(root, small_world):
    without_channels(root, "LIDAR_TOP")
    for drive, same in zip(open_drives(root), open_drives(small_world)):
        for moment, known in zip(drive, same):
            assert moment.lidars == () and moment.sweeps(3) == [] and moment.points(3).shape == (0, 5)
            assert moment.timestamp == known.timestamp and len(moment.boxes) == len(known.boxes)
            # The ego pose is that of the camera nearest in time, at most 45 ms away.
            assert torch.dist(moment.world_T_ego[:3, 3], known.world_T_ego[:3, 3]) < 0.045 * 20
            for name in NUSCENES_CAMERAS:
                world_T_cam = [m.world_T_ego @ m.rig[name].ego_T_cam for m in (moment, known)]
                torch.testing.assert_close(*world_T_cam, rtol=0, atol=1e-9)


def test_a_camera_that_one_sample_lacks_is_a_missing_file(root, small_world):
    known = open_drives(small_world)[0]
    cut_out(root, "CAM_BACK", known[1].token)
    drive = open_drives(root)[0]
    moment = drive[1]
    assert moment.rig.names == NUSCENES_CAMERAS and RigFrame.cat([m.frame for m in drive]).batch_size == 3
    assert moment.image_path("CAM_BACK") is None and moment.image_path("CAM_FRONT") is not None
    with pytest.raises(BadFile, match=f"CAM_BACK of {moment.token} is missing"):
        camera_image(moment, "CAM_BACK", ImageAugmentation())
    with pytest.raises(FileNotFoundError, match="no image of CAM_BACK"):
        moment.image("CAM_BACK")
    at_rest = torch.dist(moment.rig["CAM_BACK"].ego_T_cam[:3, 3], known[1].rig["CAM_BACK"].ego_T_cam[:3, 3])
    assert at_rest < 0.045 * 20  # but for the motion until its exposure
    assert drive[0].image_path("CAM_BACK") and torch.equal(drive[0].frame.image_T_ego, known[0].frame.image_T_ego)


def test_a_lidar_that_one_sample_lacks_is_a_missing_file(root, small_world):
    token = open_drives(small_world)[0][1].token
    cut_out(root, "LIDAR_TOP", token)
    drive = open_drives(root)[0]
    assert drive[1].lidars == ("LIDAR_TOP",) and drive[1].sweeps(3) == []
    with pytest.raises(BadFile, match=f"LIDAR_TOP of {token} is missing"):
        drive[1].points(3)
    assert len(drive[0].points()) > 0 and len(drive[2].sweeps(9)) == 1  # its chain begins anew


def test_two_lidars(root, small_world):
    """A second one behind the first, a metre higher, that sees the same."""
    first = next(row for row in read_table(root, "sensor") if row["channel"] == "LIDAR_TOP")
    mounted = [row for row in read_table(root, "calibrated_sensor") if row["sensor_token"] == first["token"]]
    edit(root, "sensor", lambda rows: rows.append({**first, "token": "second", "channel": "LIDAR_HIGH"}))

    def raised(row):
        x, y, z = row["translation"]
        return {**row, "token": "2" + row["token"], "sensor_token": "second", "translation": [x, y, z + 1]}

    edit(root, "calibrated_sensor", lambda rows: rows.extend(map(raised, mounted)))
    tokens = {row["token"] for row in mounted}

    def seconds(rows):
        for row in [row for row in rows if row["calibrated_sensor_token"] in tokens]:
            links = {field: row[field] and "2" + row[field] for field in ("token", "prev", "next")}
            rows.append({**row, **links, "calibrated_sensor_token": "2" + row["calibrated_sensor_token"]})

    edit(root, "sample_data", seconds)
    moment, known = open_drives(root)[0][2], open_drives(small_world)[0][2]
    assert moment.lidars == ("LIDAR_HIGH", "LIDAR_TOP") and len(moment.sweeps(3)) == 6
    assert [sweep.key_frame for sweep in moment.sweeps(2)] == [True, True, False, False]
    points, alone = moment.points(2), known.points(2)
    assert len(points) == 2 * len(alone) and torch.equal(moment.world_T_ego, known.world_T_ego)
    up = points.double().mean(0) - alone.double().mean(0)
    torch.testing.assert_close(up, torch.tensor([0, 0, 0.5, 0, 0], dtype=torch.float64), rtol=0, atol=5e-3)


def test_scenes_may_have_different_rigs_but_each_a_camera(root):
    scenes = [{m.token for m in drive} for drive in open_drives(root)]
    for name in NUSCENES_CAMERAS[:5]:
        for sample in scenes[1]:
            cut_out(root, name, sample)
    assert [drive[0].rig.names for drive in open_drives(root)] == [NUSCENES_CAMERAS, ("CAM_BACK",)]
    without_channels(root, *NUSCENES_CAMERAS)
    with pytest.raises(ValueError, match="scene world-0000 has no camera$"):
        open_drives(root)


def perfect(root, split):
    """The annotations of a split as detections, each car where it is."""
    found = {}
    for moment in (moment for drive in open_drives(root, split=split) for moment in drive):
        boxes = [box for box in moment.ego_boxes if box.category == "vehicle.car" and box.num_points]
        yaws = [torch.atan2(box.frame_T_box[1, 0], box.frame_T_box[0, 0]) for box in boxes]
        rows = [[*box.center, *box.size, yaw, *box.velocity[:2]] for box, yaw in zip(boxes, yaws)]
        labels = torch.zeros(len(rows), dtype=torch.int64)
        found[moment.token] = Detections(torch.tensor(rows).reshape(-1, 9), torch.ones(len(rows)), labels)
    return found


@pytest.mark.parametrize("rig", ["other names", "no lidar"])
def test_detections_of_another_rig_are_evaluated(root, rig):
    rename(root, OTHER_NAMES | {"LIDAR_TOP": "roof"}) if rig == "other names" else without_channels(root, "LIDAR_TOP")
    found = perfect(root, "world_all")
    figures = evaluate_detection(found, root, None, "world_all")
    assert figures["AP/car"] == pytest.approx(1)
    assert tracked(root, "world_all", found)["AMOTA/car"] == pytest.approx(1)


def tracked(root, split, found):
    """Figures of detections that each carry the instance of their object."""
    metric = TrackingMetric(root, None, split)
    for moment in (moment for drive in open_drives(root, split=split) for moment in drive):
        ids = [box.instance for box in moment.ego_boxes if box.category == "vehicle.car" and box.num_points]
        metric.add(moment.token, found[moment.token].boxes, ["car"] * len(ids), np.ones(len(ids)), ids)
    return metric.compute()


def test_the_roots_own_list_wins_everywhere(root, small_world):
    """Also where the devkit has a list of that name: in training, in results and in their evaluation."""
    splits = root / VERSION / "splits.json"
    splits.write_text('{"mini_train": ["world-0000"], "mini_val": ["world-0001"]}')
    assert split_names(config(root)) == ("mini_train", "mini_val")
    assert [[drive.name for drive in part] for part in drives_of_splits(config(root))] == [
        ["world-0000"],
        ["world-0001"],
    ]
    assert [drive.name for drive in open_drives(root, split="mini_val")] == ["world-0001"]
    figures = evaluate_detection(perfect(root, "mini_val"), root, None, "mini_val")
    assert figures["AP/car"] == pytest.approx(1)
    assert figures == evaluate_detection(perfect(small_world, "world_val"), small_world, None, "world_val")
    assert tracked(root, "mini_val", perfect(root, "mini_val"))["AMOTA/car"] == pytest.approx(1)


def test_a_list_of_splits_that_is_none(root):
    for content in ("[]", '{"a": "scene"}', '{"a": [1]}', "{", "null"):
        (root / VERSION / "splits.json").write_text(content)
        with pytest.raises(ValueError, match="splits.json") as caught:
            split_names(config(root))
        assert "\n" not in str(caught.value)


def test_splits_of_a_root_without_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a nuScenes root: no folder in it"):
        split_names(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        drives_of_splits(config(tmp_path / "nowhere"))


def test_a_test_split_is_read_and_written_as_a_submission(root, tmp_path):
    """As nuScenes' own: version v1.0-test, its scenes, and nobody's annotations."""
    from nuscenes.utils.splits import test as scenes

    edit(root, "scene", lambda rows: [{**row, "name": name} for row, name in zip(rows, scenes)])
    for table in ("sample_annotation", "instance"):
        edit(root, table, lambda rows: [])
    (root / VERSION / "splits.json").unlink()
    (root / VERSION).rename(root / "v1.0-test")
    assert split_names(config(root)) == (None, "test")
    training, testing = drives_of_splits(config(root))
    assert training == [] and [drive.name for drive in testing] == list(scenes[:2])
    moment = testing[0][0]
    assert not moment.annotated and moment.boxes == () and len(moment.points()) > 0 and moment.image("CAM_BACK").any()
    found = {moment.token: Detections(torch.ones(1, 9), torch.ones(1), torch.zeros(1, dtype=torch.int64))}
    assert write_results(found, open_nuscenes(root), "test", tmp_path / "results.json") == 1
    assert (tmp_path / "results.json").read_text().count('"sample_token"') == 1


def test_annotated_where_only_this_moment_has_no_box(small_world):
    assert all(moment.annotated for drive in open_drives(small_world) for moment in drive)
    assert replace(open_drives(small_world)[0][0], boxes=()).annotated
