"""Draws the pictures that a nuScenes root lacks, over its own calibration, poses, boxes and maps.

The lanes are where they are and the boxes too; houses and trees beside the road are made up. Pictures that exist are
kept. The ground is drawn flat at z = 0, as the maps are, so on a hill boxes float above it or are seen through it.
"""

import json
import os
import shutil
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from ...modules.poses import from_row, rotation_z, to_rotation
from ..data.nuscenes import tables_folder
from ..data.tables import read_tables
from .casting import Pinhole, Placed, cast
from .ground import Ground
from .paths import Path as Curve
from .processes import run_tasks
from .sensors import SHADOWS, write_depth, write_image
from .shading import Light, picture
from .shapes import body_for, building, tree
from .tables import depth_name
from .writer import CHUNK, fresh_folder, write_json

SIDE = 95.0  # metres of ground drawn round the way of the vehicle


@dataclass(frozen=True)
class Drive:
    """Where a scene leads, small enough to be sent to another process."""

    name: str
    map_file: Path
    trajectory: tuple[tuple[float, float], ...]
    obstacles: tuple[tuple[float, float], ...]  # where annotated objects have been


@dataclass(frozen=True)
class Shot:
    """A picture to draw. `boxes` are (category, size, rotation, centre, seed) at the moment of exposure."""

    filename: str
    world_T_cam: np.ndarray
    intrinsics: np.ndarray
    width: int
    height: int
    boxes: tuple


def draw_over(root: str | Path, out: str | Path, scenes=None, samples=None, workers: int = 2, progress=None) -> None:
    """Copies a nuScenes root to a new folder and draws the key frame pictures that are absent.

    Tables, maps, pictures and scans come over unchanged (the last two as hard links where the disk allows).
    `provenance.json` lists which pictures are real, which are drawn and which are still absent; drawn ones have their
    depth in `depth/`.

    Args:
        root: a nuScenes root with `maps/expansion`; images may be missing.
        out: the folder to make; absent, or empty.
        scenes: names of the scenes to draw; None = all.
        samples: draw the first so many samples of a scene only; None = all.
        workers: processes; 0 = in this one.
        progress: called with (pictures done, pictures in all).

    Raises:
        FileNotFoundError: `root` has no tables, or a map expansion is missing.
        FileExistsError: `out` exists and is not empty.
        ValueError: an unknown scene, tables that are broken (see `read_tables`), or no picture to draw.
    """
    root, with_tables = Path(root), tables_folder(root)
    tables = {name: {row["token"]: row for row in rows} for name, rows in read_tables(with_tables).items()}
    names = [row["name"] for row in tables["scene"].values()]
    unknown = [name for name in scenes or () if name not in names]
    if unknown:
        raise ValueError(f"no scene is called {unknown[0]!r}; choose from {', '.join(names)}")
    plans, real, absent = [], [], []
    for scene in tables["scene"].values():
        chosen = scenes is None or scene["name"] in scenes
        drive, shots, there, beyond = _plan(root, tables, scene, samples if chosen else 0)
        real, absent = real + there, absent + beyond
        plans += [(drive, shots[i : i + 6 * CHUNK]) for i in range(0, len(shots), 6 * CHUNK)]
    if not plans:
        raise ValueError(f"{root} has every picture{' of those asked for' if absent else ''}; there is nothing to draw")
    with fresh_folder(out) as folder:
        _take_over(root, folder, with_tables)
        tasks = [(folder, drive, shots) for drive, shots in plans]
        drawn = [shot.filename for task in tasks for shot in task[2]]
        run_tasks(_draw, tasks, workers, progress, [len(task[2]) for task in tasks])
        note = "Drawn pictures show real geometry with made-up surfaces. nuScenes' terms of use hold for all files."
        write_json(folder / "provenance.json", {"note": note, "real": real, "drawn": drawn, "absent": absent})


def _take_over(root, folder, with_tables):
    for part in (with_tables.name, "maps", "samples", "sweeps", "can_bus"):
        for source in sorted((root / part).rglob("*")):
            if source.is_file():
                target = folder / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    (os.link if part in ("samples", "sweeps") else shutil.copyfile)(source, target)
                except OSError:  # another disk
                    shutil.copyfile(source, target)


def _plan(root, tables, scene, samples):
    """(drive, shots to draw, real pictures, absent ones that are not asked for) of a scene."""
    ordered, token = [], scene["first_sample_token"]
    while token:
        ordered.append(token)
        token = tables["sample"][token]["next"]
    number = {token: k for k, token in enumerate(ordered)}
    boxes = defaultdict(list)
    for row in tables["sample_annotation"].values():
        if row["sample_token"] in number:
            boxes[row["sample_token"]].append(row)
    shots, real, absent, way = [], [], [], []
    for row in tables["sample_data"].values():
        if not row["is_key_frame"] or row["sample_token"] not in number:
            continue
        pose = tables["ego_pose"][row["ego_pose_token"]]
        way.append(tuple(pose["translation"][:2]))
        sensor = tables["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]
        if tables["sensor"][sensor]["modality"] != "camera":
            continue
        name = PurePosixPath(row["filename"])
        if len(name.parts) < 3 or name.parts[0] != "samples":
            raise ValueError(f"sample_data {row['token']}: filename is {str(name)!r}, needs samples/CAMERA/NAME")
        if (root / name).is_file():
            real.append(row["filename"])
        elif samples is not None and number[row["sample_token"]] >= samples:
            absent.append(row["filename"])
        else:
            shots.append(_shot(tables, row, pose, boxes[row["sample_token"]]))
    shots.sort(key=lambda shot: PurePosixPath(shot.filename).name.rsplit("__", 1)[-1])
    log = tables["log"][scene["log_token"]]
    location = log["location"]
    if PurePosixPath(location).name != location:
        raise ValueError(f"log {log['token']}: location {location!r} is no name of a map")
    obstacles = {tuple(np.round(row["translation"][:2], 0)) for rows in boxes.values() for row in rows}
    map_file = root / "maps" / "expansion" / f"{location}.json"
    return Drive(scene["name"], map_file, tuple(way), tuple(sorted(obstacles))), shots, real, absent


def _shot(tables, row, pose, annotations):
    calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
    late = (row["timestamp"] - tables["sample"][row["sample_token"]]["timestamp"]) / 1e6
    boxes = []
    for box in annotations:
        centre = np.array(box["translation"]) + late * _velocity(tables, box)
        instance = tables["instance"][box["instance_token"]]
        category = tables["category"][instance["category_token"]]["name"]
        seed = zlib.crc32(box["instance_token"].encode()) % 2**20
        boxes.append((category, tuple(box["size"]), to_rotation(box["rotation"]), centre, seed))
    intrinsics = np.array(calibration["camera_intrinsic"])
    world_T_cam = from_row(pose) @ from_row(calibration)
    return Shot(row["filename"], world_T_cam, intrinsics, row["width"], row["height"], tuple(boxes))


def _velocity(tables, box) -> np.ndarray:
    rows = tables["sample_annotation"]
    before, after = rows.get(box["prev"], box), rows.get(box["next"], box)
    times = [tables["sample"][row["sample_token"]]["timestamp"] / 1e6 for row in (before, after)]
    step = np.subtract(after["translation"], before["translation"])
    return step / (times[1] - times[0]) if 0 < times[1] - times[0] < 2 else np.zeros(3)


def _draw(folder: Path, drive: Drive, shots: list[Shot]):
    ground, scenery, light = _surroundings(drive)
    for shot in shots:
        view = Pinhole(shot.world_T_cam, shot.intrinsics, shot.width, shot.height)
        bodies = [
            Placed(_body(category, size, seed), rotation, centre, owner=i, seed=seed)
            for i, (category, size, rotation, centre, seed) in enumerate(shot.boxes)
        ] + scenery
        hits = cast(view, bodies, len(shot.boxes), ground_hides=False)
        near = [item for item in bodies if np.hypot(*(item.position - view.origin)[:2]) < SHADOWS]
        write_image(picture(view, hits, ground, light, near), folder / shot.filename)
        write_depth(hits.inverse, folder / depth_name(shot.filename))


_body = lru_cache(maxsize=4096)(body_for)


@lru_cache(maxsize=2)
def _surroundings(drive: Drive):
    """(ground, scenery, light) of a scene."""
    if not drive.map_file.is_file():
        raise FileNotFoundError(f"{drive.name}: maps/expansion/{drive.map_file.name} is missing; needed for the lanes")
    way = np.array(drive.trajectory)
    bounds = np.array([*(way.min(0) - SIDE), *(way.max(0) + SIDE)])
    paint, edges = _map_paint(json.loads(drive.map_file.read_text()), bounds)
    ground = Ground(bounds, paint)
    rng = np.random.default_rng(zlib.crc32(drive.name.encode()))
    azimuth = rng.uniform(0, 2 * np.pi)
    light = Light(sun=(0.6 * np.cos(azimuth), 0.6 * np.sin(azimuth), 0.8), clouds=rng.uniform(0.3, 0.8))
    return ground, _made_up(ground, edges, way, np.array(drive.obstacles).reshape(-1, 2), bounds, rng), light


def _map_paint(expansion, bounds):
    """(paint, edges (N, 3) of the road as x, y, direction every 2 m) of a map expansion inside the bounds."""
    nodes = {row["token"]: (row["x"], row["y"]) for row in expansion["node"]}
    polygons = {row["token"]: row for row in expansion["polygon"]}
    lines = {row["token"]: row for row in expansion["line"]}

    def near(tokens):
        points = np.array([nodes[token] for token in tokens]).reshape(-1, 2)
        low, high = (points.min(0), points.max(0)) if len(points) else (np.full(2, np.inf),) * 2
        return points if (low < bounds[2:]).all() and (high > bounds[:2]).all() else None

    surfaces, kerbs, edges = [], [], []
    areas = [token for row in expansion["drivable_area"] for token in row["polygon_tokens"]]
    areas += [row["polygon_token"] for row in expansion["carpark_area"]]
    for token in areas:
        holes = [hole["node_tokens"] for hole in polygons[token]["holes"]]
        for tokens, covered in [(polygons[token]["exterior_node_tokens"], True), *((hole, False) for hole in holes)]:
            outline = near(tokens)
            if outline is not None and len(outline) > 2:
                surfaces.append((outline, covered))
                outline = np.concatenate([outline, outline[:1]])
                kerbs += _strips(outline, 0.7)
                edges.append(_along(outline, 2.0))
    paint = [("white", kerb, True) for kerb in kerbs]
    paint += [("road", outline, covered) for outline, covered in surfaces]
    paint += [("white", outline, False) for outline, covered in surfaces if covered]
    for layer, channel, width, dash in (("lane_divider", "white", 0.14, 3.0), ("road_divider", "yellow", 0.16, None)):
        for row in expansion[layer]:
            line = near(lines[row["line_token"]]["node_tokens"])
            if line is not None and len(line) > 1:
                paint += [(channel, strip, True) for strip in _strips(line, width, dash)]
    for row in expansion["ped_crossing"]:
        outline = near(polygons[row["polygon_token"]]["exterior_node_tokens"])
        if outline is not None:
            paint += [("white", stripe, True) for stripe in _zebra(outline)]
    edges = np.concatenate(edges) if edges else np.zeros((0, 3))
    return paint, edges[((edges[:, :2] > bounds[:2]) & (edges[:, :2] < bounds[2:])).all(axis=1)]


def _along(line, spacing):
    """(N, 3) points and directions along a polyline."""
    curve = Curve(line)
    return curve.at(np.arange(0, curve.length, spacing)) if len(curve.points) > 1 else np.zeros((0, 3))


def _strips(line, width, dash=None):
    """Quadrilaterals along a polyline; with gaps as long as 1.5 dashes where `dash` is given."""
    if dash is None:
        pieces = np.stack([line[:-1], line[1:]], axis=1)
    else:
        points = _along(line, dash / 2)[:, :2]
        pieces = np.stack([points[:-1], points[1:]], axis=1)
        pieces = pieces[np.arange(len(pieces)) % 5 < 2]
    side = pieces[:, 1] - pieces[:, 0]
    length = np.linalg.norm(side, axis=1, keepdims=True)
    pieces, side = pieces[length[:, 0] > 1e-6], (side / np.maximum(length, 1e-6))[length[:, 0] > 1e-6]
    left = np.stack([-side[:, 1], side[:, 0]], axis=1) * (width / 2)
    return list(np.stack([pieces[:, 0] + left, pieces[:, 1] + left, pieces[:, 1] - left, pieces[:, 0] - left], axis=1))


def _zebra(outline):
    """Stripes across a four-cornered crossing, along its shorter sides; none for other shapes."""
    if len(outline) not in (4, 5):
        return []
    a, b, c, d = outline[:4]
    if np.linalg.norm(b - a) < np.linalg.norm(c - b):
        a, b, c, d = b, c, d, a
    count = max(int(np.linalg.norm(b - a)), 1)
    at = (np.arange(count)[:, None] + [0.25, 0.75]) / count
    return [np.stack([a + s * (b - a), a + e * (b - a), d + e * (c - d), d + s * (c - d)]) for s, e in at]


def _made_up(ground, edges, way, obstacles, bounds, rng):
    """Houses and trees beside the road, clear of it, of the way and of everything annotated."""
    scenery, taken = [], np.zeros((0, 3))
    if not len(edges):
        return scenery
    spots = np.stack(np.meshgrid(np.arange(bounds[0], bounds[2], 6.5), np.arange(bounds[1], bounds[3], 6.5)), axis=-1)
    spots = spots.reshape(-1, 2) + rng.uniform(-2, 2, (spots.size // 2, 2))
    off_road = ground.coverage(spots[:, 0], spots[:, 1], np.full(len(spots), 1.0))[:, 0] < 0.01
    for spot in spots[off_road]:
        apart = np.hypot(*(edges[:, :2] - spot).T)
        nearest = np.argmin(apart)
        house = apart[nearest] > 11
        if apart[nearest] > 42 or apart[nearest] < 1.5 or (not house and rng.random() > 0.35):
            continue
        seed = int(rng.integers(2**20))
        if house:
            body = building(rng.uniform(10, 17), rng.uniform(9, 13), rng.uniform(7, 22), seed)
        else:
            body = tree(rng.uniform(5, 8), seed)
        reach = 0.5 * np.hypot(*body.size[:2]) if house else 1.5
        clear = [np.hypot(*(points - spot).T).min(initial=1e9) for points in (way, obstacles)]
        packed = (np.hypot(*(taken[:, :2] - spot).T) < 0.8 * (taken[:, 2] + reach)).any()
        if min(clear) < reach + 1 or packed or (house and apart[nearest] < reach + 1):
            continue
        taken = np.vstack([taken, [*spot, reach]])
        turn = rotation_z(edges[nearest, 2] + np.pi / 2)
        scenery.append(Placed(body, turn, np.array([*spot, body.size[2] / 2]), seed=seed))
    return scenery
