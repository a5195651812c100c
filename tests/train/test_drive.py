"""The built-in drives are plausible, repeatable, and like real ones in kind."""

import pytest
import torch

from rigfuse.modules.rig import RigFrame, nuscenes_like_rig
from rigfuse.modules.topology import Topology
from rigfuse.train.data import builtin_drives, open_drives


def test_drives_are_repeatable_and_independent_of_their_number():
    first, again = builtin_drives(scenes=2, length=5), builtin_drives(scenes=3, length=5)
    for drive, same in zip(first, again):
        assert drive.name == same.name
        for a, b in zip(drive, same):
            assert a.timestamp == b.timestamp and torch.equal(a.frame.image_T_ego, b.frame.image_T_ego)
    assert not torch.equal(first[0][0].world_T_ego, first[1][0].world_T_ego)
    assert not torch.equal(first[0][0].world_T_ego, builtin_drives(1, 5, seed=1)[0][0].world_T_ego)


def test_a_car_could_drive_it():
    turned = 0.0
    for drive in open_drives(None):
        moments = list(drive)
        assert len(moments) == 40 and {moment.scene for moment in moments} == {drive.name}
        for past, now in zip(moments, moments[1:]):
            seconds = now.timestamp - past.timestamp
            assert 0.48 < seconds < 0.52
            step = torch.linalg.solve(past.world_T_ego, now.world_T_ego)
            speed = step[:2, 3].norm() / seconds
            yaw_rate = torch.atan2(step[1, 0], step[0, 0]).abs() / seconds
            assert 1 < speed < 15 and speed * yaw_rate < 3.5
            assert step[0, 3] > 0 and step[1, 3].abs() < 0.2 * step[0, 3]  # forward, not sideways
            turned = max(turned, float(yaw_rate))
    assert turned > 0.1


def test_each_camera_stands_where_it_was_at_its_own_exposure():
    mounted = nuscenes_like_rig()
    past, now = builtin_drives(1, 2, rate=20)[0]
    speed = torch.dist(past.world_T_ego[:3, 3], now.world_T_ego[:3, 3]) / (now.timestamp - past.timestamp)
    for name, lead in {"CAM_BACK_LEFT": 0.0, "CAM_BACK": 0.01, "CAM_FRONT": 0.035, "CAM_FRONT_LEFT": 0.045}.items():
        behind = (mounted[name].ego_T_cam - now.rig[name].ego_T_cam)[0, 3]
        assert behind == pytest.approx(float(speed) * lead, abs=0.01)


def test_a_parked_car_is_seen_where_it_stands():
    seen = 0
    for moment in builtin_drives(1, 8)[0]:
        for box, ego_box in zip(moment.boxes, moment.ego_boxes):
            corners = torch.cat([ego_box.corners(), torch.ones(8, 1)], dim=1)
            back = corners @ moment.world_T_ego.T
            torch.testing.assert_close(back[:, :3], box.corners(), rtol=0, atol=1e-8)
            assert box.corners()[:, 2].min().abs() < 1e-9 and ego_box.center[:2].norm() > 2
            seen += sum(bool((corners @ camera.image_T_ego.T)[:, 2].min() > 1) for camera in moment.rig.cameras)
    assert seen > 20


def test_moments_make_a_batch():
    drives = open_drives(None)
    frame = RigFrame.cat([drive[7].frame for drive in drives])
    assert frame.image_T_ego.shape == (4, 6, 4, 4) and frame.scene == tuple(drive.name for drive in drives)
    assert Topology.from_calibration(drives[0][3].rig) == Topology.named("neighbours")


def test_a_drive_is_a_sequence():
    drive = builtin_drives(1, 5)[0]
    assert [moment.timestamp for moment in drive[1:3]] == [drive[1].timestamp, drive[2].timestamp]
    assert drive[-1].timestamp == drive[4].timestamp
    with pytest.raises(IndexError, match="drive-0000 has 5 moments, no index 5"):
        drive[5]


def test_bad_input_says_what_is_needed():
    moment = builtin_drives(1, 1)[0][0]
    assert moment.image_path("CAM_BACK") is None
    with pytest.raises(FileNotFoundError, match="no image of CAM_BACK at 1600000000.* of drive-0000"):
        moment.image("CAM_BACK")
    with pytest.raises(ValueError, match="no camera 'BACK'"):
        moment.image_path("BACK")
    with pytest.raises(ValueError, match="length is 0"):
        builtin_drives(length=0)
    with pytest.raises(ValueError, match="no version or split"):
        open_drives(None, split="val")
