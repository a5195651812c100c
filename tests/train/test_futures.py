"""Futures of agents and of the ego car: against poses that are known, and against nuScenes' own tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rigfuse.modules.poses import rigid, rotation_z
from rigfuse.modules.rig import nuscenes_like_rig
from rigfuse.train.data import open_drives
from rigfuse.train.data.futures import (
    COMMANDS,
    agent_futures,
    ego_future,
    ego_velocity,
    future_boxes,
    in_agent_frames,
)
from rigfuse.train.data.moments import Box, Moment
from rigfuse.train.data.nuscenes import open_nuscenes


def turning(number=20, rate=0.1, speed=4.0, period=0.5, world=np.eye(4)):
    """A car on a circle, and another that stands 10 m left of the start; `rate` in radians per second."""
    moments = []
    for index in range(number):
        angle = rate * index * period
        radius = speed / rate
        place = [radius * np.sin(angle), radius * (1 - np.cos(angle)), 0.0]
        pose = torch.from_numpy(world @ rigid(rotation_z(angle), place))
        stands = torch.from_numpy(world @ rigid(rotation_z(1.0), [0.0, 10.0, 0.5]))
        boxes = (Box("stands", "vehicle.car", stands, (4.0, 2.0, 1.5)),) if index != 3 else ()
        moments.append(Moment("circle", index * period, pose, nuscenes_like_rig(), boxes))
    return moments


@pytest.mark.parametrize("world", [np.eye(4), rigid(rotation_z(2.0), [500.0, -300.0, 7.0])], ids=["here", "elsewhere"])
def test_the_ego_car_on_a_circle(world):
    future = ego_future(turning(world=world), 2)
    angles = np.arange(1, 7) * 0.05
    np.testing.assert_allclose(future.path, np.stack([40 * np.sin(angles), 40 * (1 - np.cos(angles))], 1), atol=1e-9)
    np.testing.assert_allclose(future.yaw, angles, atol=1e-9)
    assert future.mask.all() and COMMANDS[future.command] == "straight"  # 1.8 m to the left
    lever = future.path_of((0.94, 0.0))
    np.testing.assert_allclose(lever - future.path, 0.94 * np.stack([np.cos(angles) - 1, np.sin(angles)], 1), atol=1e-9)


def test_commands():
    for rate, command in ((0.12, "left"), (-0.12, "right"), (0.1, "straight"), (-0.1, "straight"), (1e-9, "straight")):
        assert COMMANDS[ego_future(turning(rate=rate), 0).command] == command


def test_the_end_of_a_scene():
    moments = turning()
    future = ego_future(moments, 17)
    assert future.mask.tolist() == [True, True, False, False, False, False]
    assert (future.path[2:] == 0).all() and (future.path_of((1, 0))[2:] == 0).all()
    alone = ego_future(moments, 19)
    assert not alone.mask.any() and COMMANDS[alone.command] == "straight"
    assert [len(boxes) for boxes in future_boxes(moments, 17)] == [1, 1, 0, 0, 0, 0]
    assert not ego_future(moments[:1], 0).mask.any()


@pytest.mark.parametrize("world", [np.eye(4), rigid(rotation_z(2.0), [500.0, -300.0, 7.0])], ids=["here", "elsewhere"])
def test_an_agent_that_stands(world):
    moments = turning(world=world)
    paths, mask = agent_futures(moments, 0)
    assert mask.shape == (1, 12) and mask[0].tolist() == [step != 2 for step in range(12)]
    np.testing.assert_allclose(paths[0], np.where(mask[0, :, None], (0.0, 10.0), 0.0), atol=1e-9)
    own = in_agent_frames(paths + [1.0, 0.0], np.array([[0.0, 10.0]]), np.array([1.0]))
    np.testing.assert_allclose(own[0, 0], [np.cos(1.0), -np.sin(1.0)], atol=1e-9)
    boxes = future_boxes(moments, 0)
    np.testing.assert_allclose(boxes[0], [[0, 10, 0.5, 4, 2, 1.5, 1.0]], atol=1e-9)
    assert future_boxes(moments, 0, counts=lambda box: "car" not in box.category)[0].shape == (0, 7)
    assert agent_futures([replace(moment, boxes=()) for moment in moments], 0)[0].shape == (0, 12, 2)


def test_velocity_is_of_the_past():
    moments = turning()
    assert np.isnan(ego_velocity(moments, 0)).all()
    np.testing.assert_allclose(np.hypot(*ego_velocity(moments, 5)), 4.0, rtol=1e-3)
    backwards = [replace(moment, timestamp=-moment.timestamp) for moment in reversed(moments)]
    assert ego_velocity(backwards, 5)[0] == pytest.approx(-4.0, rel=1e-3)


def test_steps_are_seconds_and_not_key_frames():
    np.testing.assert_allclose(ego_future(turning(80, period=0.1), 5).path, ego_future(turning(), 0).path, atol=1e-9)
    with pytest.raises(ValueError, match="key frames of circle are 0.300 s apart; steps of 0.5 s do not fit"):
        ego_future(turning(period=0.3), 0)


def test_the_tables_of_nuscenes_say_the_same(small_world):
    check_against_tables(small_world, None)


def test_real_tables_say_the_same(nuscenes_root):
    check_against_tables(nuscenes_root, "mini_val")


def check_against_tables(root, split):
    """Follows `next` from annotation to annotation, as the devkit's users do."""
    from nuscenes.prediction import PredictHelper

    nusc, seen = open_nuscenes(root), 0
    helper = PredictHelper(nusc)
    for drive in open_drives(root, split=split):
        moments = list(drive)
        for index in range(0, len(moments), 13):
            moment = moments[index]
            paths, mask = agent_futures(moments, index)
            world_T_ego = moment.world_T_ego.numpy()
            for box, path, known in list(zip(moment.boxes, paths, mask))[:15]:
                rows = helper.get_future_for_agent(box.instance, moment.token, 6.2, False, just_xy=False)
                places = {row["sample_token"]: row["translation"] for row in rows}
                for later, place, has in zip(moments[index + 1 :], path, known):
                    assert has == (later.token in places)
                    if has:
                        seen += 1
                        back = world_T_ego[:2, :2] @ place + world_T_ego[:2, 3]
                        # The height is not kept, and the ego frame is tilted by a degree or so.
                        assert np.hypot(*(back - places[later.token][:2])) < 0.5
    assert seen > 20
