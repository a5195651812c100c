"""What happens in a generated drive: motion of the ego vehicle and of others, classes, towns, times."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rigfuse.train.world import WorldSettings, check_world, make_world
from rigfuse.train.world.paths import Path, boxes_meet
from rigfuse.train.world.populate import EGO_SIZE
from rigfuse.train.world.scene import Scene, is_validation, place_of
from rigfuse.train.world.sight import Sight
from rigfuse.train.world.town import TILE, tile_origin, tiles_across

CLASSES = (
    "vehicle.car", "vehicle.truck", "vehicle.trailer", "vehicle.bus", "vehicle.construction", "vehicle.motorcycle",
    "vehicle.bicycle", "human.pedestrian", "movable_object.trafficcone", "movable_object.barrier",
)  # fmt: skip


def moving(scene, prefix="vehicle"):
    return [actor for actor in scene.actors if actor.category.startswith(prefix) and not actor.parked]


def aside(scene, t):
    """Metres to the left after 3 s."""
    now, then = scene.ego.at(t), scene.ego.at(t + 3)
    return (then[1] - now[1]) * np.cos(now[2]) - (then[0] - now[0]) * np.sin(now[2])


def test_the_ego_vehicle_drives_turns_both_ways_and_stops(long_scenes):
    times = np.arange(0, 17, 0.5)
    commands = Counter(np.sign(aside(s, t)) * (abs(aside(s, t)) > 2) for s in long_scenes for t in times)
    share = {side: count / sum(commands.values()) for side, count in commands.items()}
    assert share[1] > 0.06 and share[-1] > 0.06, share  # left and right
    speeds = np.array([[scene.ego.speed(t) for t in times] for scene in long_scenes])
    assert 0.05 < (speeds < 0.2).mean() < 0.45 and speeds.mean() > 2.5 and speeds.max() < 12
    steps = np.diff(np.array([scene.ego.travelled(np.arange(0, 20, 0.1)) for scene in long_scenes]), axis=1) / 0.1
    acceleration = np.diff(steps, axis=1) / 0.1
    assert acceleration.min() > -8 and acceleration.max() < 2.5


def test_the_ego_vehicle_keeps_to_lanes_and_ways_through_junctions(long_scenes):
    for scene in long_scenes:
        lines = [lane.points for lane in scene.town.lanes] + [way.points for way in scene.town.connectors]
        dense = np.concatenate([Path(line).resampled(0.5).points for line in lines])
        for t in np.arange(0, 20, 1.0):
            assert np.linalg.norm(dense - scene.ego.at(t)[:2], axis=1).min() < 0.6


def test_nobody_runs_into_anybody(long_scenes):
    times = np.arange(0, 20, 0.2)
    for scene in long_scenes[:3]:
        tracks = np.array([scene.ego.at(times)] + [actor.motion.at(times) for actor in scene.actors])
        sizes = np.array([EGO_SIZE[:2]] + [actor.size[:2] for actor in scene.actors])
        for i in range(len(tracks)):
            assert not boxes_meet(tracks[i], sizes[i], tracks[i + 1 :], sizes[i + 1 :]).any()


def test_others_have_motions_of_their_own(long_scenes):
    """Vehicles turn, stop and go again; those near the ego vehicle at the start do not copy it; people cross."""
    turns = stops = crossers = copies = followed = 0
    times = np.arange(0, 20, 0.5)
    for scene in long_scenes:
        ego = np.array([scene.ego.speed(t) for t in times])
        for actor in moving(scene):
            heading = np.unwrap(actor.motion.at(times)[:, 2])
            speed = np.array([actor.motion.speed(t) for t in times])
            turns += np.ptp(heading) > 1.0
            stops += bool((speed < 0.2).any() and (speed > 3).any())
            if np.linalg.norm(actor.motion.at(0)[:2] - scene.ego.at(0)[:2]) < 30:
                followed += 1
                copies += np.abs(speed - ego).max() < 0.5
        for actor in moving(scene, "human"):
            track = actor.motion.at(times)[:, :2]
            on_road = np.zeros(len(times), bool)
            for road in scene.town.roads:
                offset = track - road.start
                s, t = offset @ road.along, offset @ [-road.along[1], road.along[0]]
                on_road |= (s > 0) & (s < 5) & (abs(t) < road.half)
            crossers += on_road.any() and np.ptp(track, axis=0).max() > 3
    assert turns > 20 and stops > 10 and crossers >= 6
    assert followed >= 4 and copies == 0


def test_every_class_is_in_sight_in_every_drive_at_varied_places(long_scenes):
    places = {name: [] for name in CLASSES}
    for scene in long_scenes:
        for name in CLASSES:
            for actor in (actor for actor in scene.actors if actor.category.startswith(name)):
                delta = np.array([actor.motion.at(t)[:2] - scene.ego.at(t)[:2] for t in np.arange(0, 20, 1.0)])
                nearest = delta[np.linalg.norm(delta, axis=1).argmin()]
                t = np.linalg.norm(delta, axis=1).argmin()
                heading = actor.motion.at(float(t))[2] - scene.ego.at(float(t))[2]
                c, s = np.cos(scene.ego.at(float(t))[2]), np.sin(scene.ego.at(float(t))[2])
                if np.hypot(*nearest) < 50:
                    places[name].append((scene.index, nearest @ [c, s], nearest @ [-s, c], heading))
    for name, found in places.items():
        found = np.array(found)
        assert set(found[:, 0]) == set(range(6)), f"{name} is missing from a drive"
        assert np.std(np.hypot(found[:, 1], found[:, 2])) > 3, name
        assert len(np.unique(found[:, 1:].round(1), axis=0)) > 0.9 * len(found), name
    counts = {name: len(found) for name, found in places.items()}
    assert counts["vehicle.car"] > 0.8 * max(counts.values())
    assert counts["human.pedestrian"] > counts["movable_object.barrier"] > counts["vehicle.construction"]
    assert max(counts[name] for name in ("vehicle.bus", "vehicle.trailer")) < 0.2 * counts["vehicle.car"]


def test_a_short_drive_shows_every_class(scene):
    sight = Sight(scene.scenery)
    for name in CLASSES:
        seen = 0
        for t in (0.0, 0.5, 1.0):
            boxes = np.array([(*actor.motion.at(t), *actor.size) for actor in scene.actors])
            for i, actor in enumerate(scene.actors):
                if actor.category.startswith(name):
                    others = np.delete(boxes, i, axis=0)
                    seen += sight.sees(scene.ego.at(t)[:2], boxes[i], 40.0, others)
        assert seen, name


@pytest.mark.parametrize("scenes", [2, 9, 60])
def test_towns_are_never_shared(scenes):
    """Every scene has a tile of its own on a map, and maps of validation are no maps of training."""
    places = [place_of(index) for index in range(scenes)]
    assert len(set(places)) == scenes
    trained, validated = ({p for i, (p, _) in enumerate(places) if is_validation(i) == val} for val in (False, True))
    assert validated and trained and not trained & validated
    for place in trained | validated:
        slots = sorted(slot for p, slot in places if p == place)
        assert slots == list(range(len(slots)))
        origins = [tile_origin(slot) for slot in slots]
        assert np.max(origins) == (tiles_across(len(slots)) - 1) * TILE
        assert len({tuple(origin) for origin in origins}) == len(origins)


def test_towns_differ_in_shape_and_not_in_place_alone(long_scenes):
    shapes = []
    for scene in long_scenes:
        lengths = [road.length for road in scene.town.roads]
        for other in shapes:
            assert not np.isin(np.round(lengths, 3), np.round(other, 3)).any()
        shapes.append(lengths)
        assert (scene.town.nodes > tile_origin(place_of(scene.index)[1])).all()


def test_the_vehicle_pitches_and_rolls(long_scenes):
    angles = []
    for scene in long_scenes:
        for t in np.arange(0, 20, 0.5):
            pose = scene.ego_pose(t)
            x, y, heading = scene.ego.at(t)
            np.testing.assert_allclose(pose[:2, 3], [x, y])
            assert np.cos(np.arctan2(pose[1, 0], pose[0, 0]) - heading) > 0.999
            angles.append((np.arcsin(-pose[2, 0]), np.arcsin(pose[2, 1])))
    spread = np.degrees(np.std(angles, axis=0))
    assert (spread > 0.2).all() and np.degrees(np.abs(angles).max()) < 4


def test_ten_key_frames_a_second(tmp_path):
    settings = WorldSettings(scenes=2, samples=4, width=64, period=0.1, town="parking")
    make_world(tmp_path / "fast", settings, workers=0)
    assert check_world(tmp_path / "fast") == []
    fast, slow = (Scene(0, 0, samples, period) for samples, period in ((11, 0.1), (3, 0.5)))
    assert fast.duration == pytest.approx(1.1) and slow.duration == 1.5
    with pytest.raises(ValueError, match="period"):
        replace(settings, period=0.01)
    with pytest.raises(ValueError, match="streets, parking"):
        replace(settings, town="village")
    with pytest.raises(ValueError, match="120 s"):
        replace(settings, samples=2000)
