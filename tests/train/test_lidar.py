"""LiDAR scans and the boxes' velocities, against the devkit and against geometry."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rigfuse.train.data import builtin_drives, open_drives
from rigfuse.train.data.files import BadFile
from rigfuse.train.data.moments import Sweep


@pytest.fixture(scope="module")
def drives(small_world):
    return open_drives(small_world)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_scans_are_put_together_as_the_devkit_does(small_world, drives, count):
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud

    nusc = NuScenes("v1.0-mini", str(small_world), verbose=False)
    for moment, scans in zip(drives[1], [1, 4, 7]):
        sample = nusc.get("sample", moment.token)
        cloud, lags = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", count, 1.0)
        lidar = moment.sweeps(1)[0]
        xyz = torch.from_numpy(cloud.points[:3].T).double() @ lidar.ego_T_lidar[:3, :3].T + lidar.ego_T_lidar[:3, 3]
        points = moment.points(count)
        assert points.dtype == torch.float32 and points.shape == (len(xyz), 5)
        torch.testing.assert_close(points[:, :3].double(), xyz, rtol=0, atol=1e-4)
        torch.testing.assert_close(points[:, 3], torch.from_numpy(cloud.points[3] / 255).float())
        torch.testing.assert_close(points[:, 4], torch.from_numpy(lags[0]).float(), rtol=0, atol=1e-5)
        assert len(moment.sweeps(count)) == min(scans, count) == len(points[:, 4].unique())


def test_points_lie_in_the_boxes_that_claim_them(drives):
    """Whole bodies fill their boxes, so many points lie on a face: 2 mm more or less may count."""
    total = 0
    for moment in (moment for drive in drives for moment in drive):
        points = moment.points().double()[:, :3]
        for box in moment.ego_boxes:
            local = (points - box.center) @ box.frame_T_box[:3, :3]
            depth = (torch.tensor(box.size) / 2 - local.abs()).amin(1)
            assert (depth > 0.002).sum() <= box.num_points <= (depth > -0.002).sum()
            total += box.num_points
    assert total > 10_000


def test_velocities_are_differences_of_places_in_ego_axes(drives):
    moving = 0
    for drive in drives:
        before, now, after = (drive[index] for index in range(3))
        places = [{box.instance: box.center for box in moment.boxes} for moment in (before, now, after)]
        rotation = now.world_T_ego[:3, :3]
        for box in now.ego_boxes:
            times = [m.timestamp for m, place in zip((before, now, after), places) if box.instance in place]
            ends = [place[box.instance] for place in places if box.instance in place]
            if len(ends) == 1:
                assert box.velocity.isnan().all()
                continue
            expected = (ends[-1] - ends[0]) / (times[-1] - times[0])
            torch.testing.assert_close(rotation @ box.velocity, expected, rtol=0, atol=1e-5)
            moving += int(expected.norm() > 1)
    assert moving > 4


def test_points_on_the_ego_car_or_not_finite_are_left_out(tmp_path):
    inf, nan = math.inf, math.nan
    rows = [[0.9, -0.9, 0, 51, 1], [nan, 4, 0, 51, 1], [3, 4, inf, 51, 1], [3, 4, 0, -inf, 1], [3, 4, 0, 51, nan]]
    rows += [[0.9, -1.1, 0, 51, 1], [-2, 0, 0.5, 255, 1]]
    np.array(rows, np.float32).tofile(tmp_path / "scan.bin")
    ego_T_lidar = torch.tensor([[0.0, 1, 0, 1], [-1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]], dtype=torch.float64)
    expected = torch.tensor([[-0.1, -0.9, 2, 0.2, 0.5], [1, 2, 2.5, 1, 0.5]])
    points, dropped = Sweep(tmp_path / "scan.bin", ego_T_lidar, 0.5).read()
    torch.testing.assert_close(points, expected)
    assert dropped == 4
    assert builtin_drives(scenes=1)[0][0].points(3).shape == (0, 5)  # that drive has no LiDAR


def test_an_earlier_scan_that_is_missing_or_empty_is_left_out_and_no_other(drives, tmp_path):
    moment = drives[1][2]
    scans = [replace(scan, path=tmp_path / f"{number}.bin") for number, scan in enumerate(moment.sweeps(4))]
    for scan in scans:
        np.array([[3, 4, 0, 51, 1], [np.nan] * 5], np.float32).tofile(scan.path)
    moment = replace(moment, find_sweeps=lambda number: scans[:number])
    assert [scan.key_frame for scan in scans] == [True, False, False, False]
    assert len(moment.points(4)) == 4 and moment.scan(4).dropped == 4
    scans[1].path.unlink()
    scans[3].path.write_bytes(b"")
    assert moment.scan(4).points[:, 4].tolist() == pytest.approx([scans[0].lag, scans[2].lag])
    scans[2].path.write_bytes(b"1234")
    with pytest.raises(BadFile, match="2.bin has 4 bytes"):
        moment.points(4)
    for damage in (b"", None):
        scans[0].path.unlink() if damage is None else scans[0].path.write_bytes(damage)
        with pytest.raises(BadFile, match="0.bin"):
            moment.points(1)
