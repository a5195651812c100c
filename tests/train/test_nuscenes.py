"""Real calibration, poses and annotations, held against nuscenes-devkit and the data's own description."""

import pickle
import sys

import numpy as np
import pytest
import torch

from rigfuse.modules.topology import Topology
from rigfuse.train.data import open_drives
from support.roots import copy_root

NEIGHBOURS = Topology.named("neighbours")


def test_scenes_and_moments(nuscenes):
    assert len(nuscenes) == 10 and sum(map(len, nuscenes)) == 404
    assert sum(len(moment.boxes) for drive in nuscenes for moment in drive) == 18_538
    for drive in nuscenes:
        times = [moment.timestamp for moment in drive]
        assert np.diff(times).min() > 0.35 and np.diff(times).max() < 0.7
        assert 1.5e9 < times[0] < 1.6e9
        assert Topology.from_calibration(drive[0].rig) == NEIGHBOURS


def test_images_are_there_or_not(nuscenes):
    drives = {drive.name: drive for drive in nuscenes}
    for scene, present in {"scene-0061": [0], "scene-0103": [0, 1, 5], "scene-0916": []}.items():
        for index, moment in enumerate(drives[scene]):
            found = {moment.image_path(camera) is not None for camera in moment.rig.names}
            assert found == {index in present}
    image = drives["scene-0103"][1].image("CAM_BACK")
    assert image.shape == (3, 900, 1600) and 0.1 < image.mean() < 0.9
    with pytest.raises(FileNotFoundError, match="no image of CAM_BACK at .* of scene-0103"):
        drives["scene-0103"][2].image("CAM_BACK")


@pytest.mark.parametrize("source", ["nuscenes", "ddad"])
def test_boxes_project_where_the_devkit_says(source, request):
    from nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    root, drives = request.getfixturevalue(f"{source}_root"), request.getfixturevalue(source)
    nusc = NuScenes("v1.0-mini", str(root), verbose=False)
    compared = 0
    for moment in [drive[len(drive) // 2] for drive in drives]:
        boxes = {box.token: box for box in moment.ego_boxes}
        for camera in moment.rig.cameras:
            token = nusc.get("sample", moment.token)["data"][camera.name]
            _, visible, intrinsic = nusc.get_sample_data(token, BoxVisibility.ALL)
            for expected in visible:
                corners = torch.cat([boxes[expected.token].corners(), torch.ones(8, 1)], dim=1) @ camera.image_T_ego.T
                pixels = view_points(expected.corners(), intrinsic, normalize=True)[:2].T
                np.testing.assert_allclose((corners[:, :2] / corners[:, 2:3]).numpy(), pixels, rtol=0, atol=1e-5)
                compared += 1
    assert compared > 5


def test_drives_travel_to_other_processes(ddad):
    (drive,) = pickle.loads(pickle.dumps(ddad))
    assert torch.equal(drive[1].frame.image_T_ego, ddad[0][1].frame.image_T_ego) and len(drive[1].points(2)) > 10_000


def test_ddad(ddad):
    (drive,) = ddad
    assert drive.name == "ddad-02" and len(drive) == 3
    past, now = drive[0], drive[1]
    seconds = now.timestamp - past.timestamp
    assert seconds == pytest.approx(0.1, abs=0.002)
    assert torch.dist(past.world_T_ego[:3, 3], now.world_T_ego[:3, 3]) / seconds == pytest.approx(12.7, abs=0.1)
    assert [len(moment.boxes) for moment in drive] == [13] * 3
    assert Topology.from_calibration(now.rig) == NEIGHBOURS
    camera = now.rig["CAM_FRONT"]
    assert now.image("CAM_FRONT").shape == (3, 1216, 1936) == (3, camera.height, camera.width)


def test_splits(nuscenes_root, ddad_root):
    assert [drive.name for drive in open_drives(nuscenes_root, split="mini_val")] == ["scene-0103", "scene-0916"]
    assert len(open_drives(ddad_root, "v1.0-mini", split="all")) == 1
    assert len(open_drives(ddad_root, split="mini_val")) == 1  # its own list, not the devkit's of that name
    with pytest.raises(ValueError, match="no scene of the split 'mini_train'"):
        open_drives(ddad_root, split="mini_train")
    with pytest.raises(ValueError, match="no split 'vall'; did you mean 'val'"):
        open_drives(ddad_root, split="vall")


def test_a_root_that_is_none_gets_one_line(tmp_path, ddad_root):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; needs a nuScenes root$"):
        open_drives(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a nuScenes root: no folder in it"):
        open_drives(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no version 'v1.0-trainval'"):
        open_drives(ddad_root, "v1.0-trainval")
    for version in ("v1.0-mini", "v1.0-test"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "sample_data.json").write_text("[]")
    with pytest.raises(ValueError, match="several versions; choose one of v1.0-mini, v1.0-test"):
        open_drives(tmp_path)
    with pytest.raises(ValueError, match="v1.0-mini/category.json is missing$"):
        open_drives(tmp_path, "v1.0-mini")


def test_what_the_devkit_refuses_is_one_line(tmp_path, ddad_root):
    root = copy_root(ddad_root, tmp_path / "root")
    next((root / "maps").glob("*.png")).unlink()
    with pytest.raises(ValueError, match="^nuscenes-devkit cannot open .*v1.0-mini: map mask .* does not exist$"):
        open_drives(root)


def test_without_the_devkit_one_line_says_what_to_install(ddad_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nuscenes", None)
    with pytest.raises(ImportError, match=r"needs nuscenes: pip install '.\[nuscenes\]'"):
        open_drives(ddad_root)


def test_real_vehicles_say_how_they_move(nuscenes, ddad):
    """The CAN bus against the poses a little before and after, in real data."""
    compared = 0
    for drive in nuscenes:
        moments = list(drive)
        for before, now, after in zip(moments, moments[1:], moments[2:]):
            state = now.ego_state()
            assert 0 <= state.lag < 0.1
            seconds = after.timestamp - before.timestamp
            step = torch.linalg.solve(before.world_T_ego, after.world_T_ego)
            speed, turning = step[:3, 3].norm() / seconds, torch.atan2(step[1, 0], step[0, 0]) / seconds
            assert (state.velocity.norm() - speed).abs() < 0.6 and (state.rotation_rate[2] - turning).abs() < 0.06
            assert 8 < state.acceleration[2] < 12  # gravity is in it
            compared += 1
    assert compared == 384
    assert ddad[0][0].ego_state() is None


def test_annotations_of_an_object_are_linked(nuscenes):
    drive = next(drive for drive in nuscenes if drive.name == "scene-0103")
    assert drive[0].location == "boston-seaport" and drive[0].annotated
    followed = 0
    for now, later in zip(drive[:5], drive[1:6]):
        next_ones = {box.token: box for box in later.boxes}
        for box in now.boxes:
            if box.next in next_ones:
                assert next_ones[box.next].instance == box.instance and next_ones[box.next].prev == box.token
                followed += 1
            else:
                assert box.instance not in {other.instance for other in later.boxes}
    assert followed > 100
