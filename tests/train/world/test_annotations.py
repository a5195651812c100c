"""Boxes in the tables against the actors that were drawn: place, size, heading, motion, returns, visible pixels."""

import numpy as np
import pytest

from rigfuse.modules.poses import from_row, inverse
from rigfuse.train.world import read_depth, tables
from rigfuse.train.world.casting import Pinhole, Placed, Scanner, cast
from rigfuse.train.world.scene import REACH, Scene
from rigfuse.train.world.sensors import EGO_T_LIDAR, ELEVATIONS, LIDAR_REACH, STEPS, default_cameras
from rigfuse.train.world.tables import Tables, depth_name, make_token

BOUNDS = {"1": (0.0, 0.4), "2": (0.4, 0.6), "3": (0.6, 0.8), "4": (0.8, 1.0)}


@pytest.fixture(scope="module")
def drawn(world, rows, settings):
    """(row, actor's number, scene, seconds) of every annotation of the world."""
    by_token = {row["token"]: row for row in rows("sample_annotation")}
    found = []
    for index in range(settings.scenes):
        scene = Scene(settings.seed, index, settings.samples)
        for number in range(len(scene.actors)):
            for k in range(settings.samples):
                row = by_token.pop(make_token(settings.seed, "sample_annotation", (index, number, k)), None)
                if row:
                    found.append((row, number, scene, k * settings.period))
    assert not by_token  # nothing else is annotated
    return found


def test_boxes_are_where_the_actors_are(drawn, rows):
    names = {row["token"]: row["name"] for row in rows("category")}
    category = {row["token"]: names[row["category_token"]] for row in rows("instance")}
    for row, number, scene, t in drawn:
        actor = scene.actors[number]
        x, y, heading = actor.motion.at(t)
        np.testing.assert_allclose(row["translation"], [x, y, actor.size[2] / 2], atol=6e-3)
        np.testing.assert_allclose(from_row(row)[:2, 0], [np.cos(heading), np.sin(heading)], atol=1e-9)
        assert row["size"] == list(actor.size) and category[row["instance_token"]] == actor.category
        assert np.hypot(*(np.array([x, y]) - scene.ego.at(t)[:2])) < REACH or row["prev"] or row["next"]


def test_whatever_the_lidar_meets_of_an_actor_is_in_its_box_and_nothing_else_is(drawn):
    """The counts follow from which body each ray met, without a look at the boxes.

    Only a speed bump may be in the box of a vehicle that drives over it.
    """
    met, foreign = {}, []
    for row, number, scene, t in drawn:
        if (scene.index, t) not in met:
            view = Scanner(scene.ego_pose(t) @ EGO_T_LIDAR, ELEVATIONS, STEPS)
            met[scene.index, t] = cast(view, scene.bodies(t), len(scene.actors), reach=LIDAR_REACH).visible
        if np.hypot(*(np.array(row["translation"][:2]) - scene.ego.at(t)[:2])) < REACH:
            foreign.append(row["num_lidar_pts"] - met[scene.index, t][number])
    assert min(foreign) == 0 and max(foreign) < 8 and np.mean(np.array(foreign) > 0) < 0.02
    assert sum(row["num_lidar_pts"] > 20 for row, *_ in drawn) > 30


def test_visibility_is_the_share_of_pixels_that_the_depth_pictures_show(drawn, world, rows, scene, settings):
    """Counted in the depth on disk: a pixel shows a box where its point in space is inside it."""
    calibration = {row["token"]: row for row in rows("calibrated_sensor")}
    poses = {row["token"]: row for row in rows("ego_pose")}
    shots = [row for row in rows("sample_data") if row["width"] and row["is_key_frame"]]
    checked = dict.fromkeys(BOUNDS, 0)
    for row, number, of, t in drawn:
        actor = of.actors[number]
        if of.index or t or not actor.motion.is_still or actor.size[2] < 1:
            continue
        seen = alone = 0
        for shot in (shot for shot in shots if shot["sample_token"] == row["sample_token"]):
            mounted = calibration[shot["calibrated_sensor_token"]]
            view_T = from_row(poses[shot["ego_pose_token"]]) @ from_row(mounted)
            view = Pinhole(view_T, np.array(mounted["camera_intrinsic"]), shot["width"], shot["height"])
            only = Placed(actor.body, *actor.pose(t), owner=0)
            hits = cast(view, [only], 1)
            pixels = np.flatnonzero(hits.face.ravel() >= 0)
            alone += hits.alone[0]
            if len(pixels):
                depth = read_depth(world / depth_name(shot["filename"])).ravel()[pixels]
                points = view.origin[:, None] + view.directions(pixels) * depth
                local = inverse(from_row(row)) @ np.concatenate([points, np.ones((1, len(pixels)))])
                half = np.array([[actor.size[1]], [actor.size[0]], [actor.size[2]]]) / 2
                seen += (np.abs(local[:3]) < half + 0.02).all(axis=0).sum()
        if alone < 60:
            continue
        low, high = BOUNDS[row["visibility_token"]]
        assert low - 0.06 <= seen / alone <= high + 0.06, (actor.category, seen / alone)
        checked[row["visibility_token"]] += 1
    assert checked["1"] > 1 and checked["4"] > 5


def test_levels_of_visibility_are_those_of_nuscenes():
    levels = [tables._visibility(visible, 100) for visible in (0, 39, 40, 59, 60, 79, 80, 100)]
    assert "".join(levels) == "11223344" and tables._visibility(0, 0) == "1"


def test_velocities_and_attributes_are_those_of_the_motion(drawn, rows, nusc):
    names = {row["token"]: row["name"] for row in rows("attribute")}
    told = set()
    for row, number, scene, t in drawn:
        actor = scene.actors[number]
        given = [names[token] for token in row["attribute_tokens"]]
        speed = actor.motion.speed(t)
        if "moving" in given[0] if given else False:
            assert speed > 0.15
        if given and given[0].split(".")[1] in ("stopped", "standing"):
            assert speed < 0.25
        if given and given[0].split(".")[1] in ("parked", "without_rider"):
            assert actor.motion.is_still
        told |= set(given)
        if row["prev"] and row["next"]:
            step = scene.period
            expected = (actor.motion.at(t + step)[:2] - actor.motion.at(t - step)[:2]) / (2 * step)
            np.testing.assert_allclose(nusc.box_velocity(row["token"])[:2], expected, atol=2e-3)
    assert {"vehicle.moving", "vehicle.parked", "pedestrian.moving", "pedestrian.standing"} <= told


def test_sizes_vary_as_their_class_does(long_scenes):
    sizes = {}
    for scene in long_scenes:
        for actor in scene.actors:
            sizes.setdefault(actor.category, []).append(actor.size)
    for category, least in (("vehicle.car", 0.09), ("vehicle.truck", 0.15), ("human.pedestrian.adult", 0.06)):
        lengths = np.array(sizes[category])[:, 1]
        assert lengths.std() / lengths.mean() > least, category
    heights = np.array(sizes["vehicle.car"])[:, 2]
    assert heights.min() > 1.2 and heights.max() < 2.4


def test_attributes_change_with_the_motion(long_scenes):
    """Over 20 s; the tables are written as if everything were seen, which needs no pictures."""
    scene = long_scenes[0]
    tables = Tables(3, default_cameras(64), scene.samples, scene.period, sweeps=0)
    seen = np.ones(len(scene.actors), dtype=int)
    tables.add_scene(scene, [dict(lidar=seen, visible=seen, alone=seen)] * scene.samples)
    names = {row["token"]: row["name"] for row in tables.rows["attribute"]}
    rows = {row["token"]: row for row in tables.rows["sample_annotation"]}
    changes = 0
    for number, actor in enumerate(scene.actors):
        told = set()
        for k in range(scene.samples):
            row = rows.get(make_token(3, "sample_annotation", (scene.index, number, k)))
            if row and row["attribute_tokens"] and not actor.parked and "cycle" not in actor.category:
                told.add(names[row["attribute_tokens"][0]])
                around = actor.motion.at(k * scene.period + np.array([-0.1, 0.1]))[:, :2]
                speed = np.linalg.norm(around[1] - around[0]) / 0.2
                assert abs(speed - 0.2) < 0.02 or names[row["attribute_tokens"][0]].endswith("moving") == (speed > 0.2)
        changes += len(told) > 1
    assert changes > 3
