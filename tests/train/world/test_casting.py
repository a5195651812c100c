"""Depth, faces and colours of the generated world's renderer against plain geometry."""

from pathlib import Path

import numpy as np
import pytest

from rigfuse.modules.poses import from_row, inverse, rigid, rotation_xyz, to_quaternion, to_rotation
from rigfuse.train.world import read_depth
from rigfuse.train.world.casting import Pinhole, Placed, cast
from rigfuse.train.world.sensors import default_cameras
from rigfuse.train.world.shading import picture
from rigfuse.train.world.solids import Body, Look, ball, box, cylinder

AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # world_R_cam of a camera that looks along x


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


def view_of(scene, name, t=0.0):
    camera = {camera.name: camera for camera in default_cameras(640)}[name]
    return Pinhole(scene.ego_pose(t) @ camera.ego_T_cam, camera.intrinsics, camera.width, camera.height)


def project(points, cam_T_world, intrinsics):
    local = cam_T_world[:3, :3] @ points + cam_T_world[:3, 3:]
    pixels = intrinsics @ local
    return np.rint(pixels[:2] / np.maximum(pixels[2], 1e-6)).astype(int), local[2]


@pytest.mark.parametrize("t", [0.0, 12.0])
def test_corners_of_bodies_are_as_deep_as_the_depth_says(long_scenes, t):
    total = shown = 0
    for scene in long_scenes[:3]:
        for camera in default_cameras(640):
            world_T_cam = scene.ego_pose(t) @ camera.ego_T_cam
            view = Pinhole(world_T_cam, camera.intrinsics, camera.width, camera.height)
            depth = 1 / np.maximum(cast(view, scene.bodies(t), len(scene.actors)).inverse, 1e-6)
            for actor in scene.actors:
                if not actor.category.startswith(("vehicle.car", "vehicle.truck", "vehicle.bus", "vehicle.trailer")):
                    continue  # the others are thinner than a pixel is wide
                rotation, centre = actor.pose(t)
                corners = actor.body.solids[0].vertices
                corners = (corners + 0.2 * (corners.mean(0) - corners)).T  # inside by more than a pixel
                (u, v), z = project(rotation @ corners + centre[:, None], inverse(world_T_cam), camera.intrinsics)
                kept = (z > 2) & (z < 40) & (u >= 0) & (v >= 0) & (u < camera.width) & (v < camera.height)
                gap = z[kept] - depth[v[kept], u[kept]]
                assert (gap > -0.35).all(), f"{actor.category} is seen through"
                total, shown = total + len(gap), shown + (gap < 0.35).sum()
    assert total > 120 and shown > 0.04 * total


@pytest.mark.parametrize("other, later", [("CAM_FRONT_LEFT", 0.0), ("CAM_FRONT", 0.5)])
def test_a_surface_has_one_colour_in_two_pictures(long_scenes, other, later):
    at_depth, beyond = np.mean([colour_differences(scene, other, later) for scene in long_scenes[:3]], axis=0)
    assert at_depth < 7 and at_depth < 0.4 * beyond


def colour_differences(scene, other, later):
    """How much the colours of what does not move differ where the depth says it is, and where 1.3 times it would be."""
    scenery = scene.scenery + [item for item in scene.bodies(0) if item.owner >= 0 and scene.actors[item.owner].parked]
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

    return difference(1.0), difference(1.3)


@pytest.mark.parametrize("channel", ["CAM_FRONT_LEFT", "CAM_BACK"])
def test_depth_on_disk_is_that_of_the_tables_pose_calibration_and_time(world, rows, scene, channel):
    tables = {name: {row["token"]: row for row in rows(name)} for name in ("ego_pose", "calibrated_sensor")}
    for row in [row for row in rows("sample_data") if f"/{channel}/world-0-0000" in row["filename"]]:
        calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
        world_T_cam = from_row(tables["ego_pose"][row["ego_pose_token"]]) @ from_row(calibration)
        view = Pinhole(world_T_cam, np.array(calibration["camera_intrinsic"]), row["width"], row["height"])
        seconds = (row["timestamp"] - 1_600_000_000_000_000) / 1e6
        inverse_depth = cast(view, scene.bodies(seconds), len(scene.actors)).inverse
        expected = np.where(inverse_depth > 1 / 255, 1 / np.maximum(inverse_depth, 1e-6), 0)
        written = read_depth(world / "depth" / channel / Path(row["filename"]).with_suffix(".png").name)
        off = np.abs(written - expected) > 0.003 + 1e-4 * expected
        assert off.mean() < 1e-4  # a pixel on an outline may fall to either side
