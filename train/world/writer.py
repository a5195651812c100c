"""Makes a world: renders every sample, in several processes, and puts a whole folder in place at the end or none."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .expansion import map_expansion, map_mask
from .processes import run_tasks
from .records import markings_record
from .scene import Scene, is_validation
from .sensors import LIDAR, Camera, count_points, default_cameras, photograph, scan
from .summary import summarise
from .tables import PLACES, Tables, depth_name, file_name, make_token, scene_name, shots
from .town import STYLES

VERSION = "v1.0-mini"  # the devkit's default, so that every tool for nuScenes opens a world as it is
LONGEST = 120.0  # seconds
CHUNK = 3  # samples a process renders at a time, where there are few scenes


@dataclass(frozen=True)
class WorldSettings:
    """What is made. Scene n depends on n and on all of these but `scenes`, not on how many scenes there are."""

    seed: int = 0
    scenes: int = 5
    samples: int = 20  # key frames in a scene
    period: float = 0.5  # seconds between key frames
    width: int = 704  # of the pictures, pixels; 16:9
    sweeps: int = 1  # LiDAR scans between two key frames
    town: str = "streets"  # or parking

    def __post_init__(self):
        if self.town not in STYLES:
            raise ValueError(f"town is {self.town!r}; needs one of {', '.join(STYLES)}")
        bounds = {
            "seed": (0, 2**31), "scenes": (1, 400), "samples": (1, 2000), "period": (0.1, 2.0), "width": (64, 3840),
            "sweeps": (0, 9),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; needs {low} to {high}")
        if self.width % 16:
            raise ValueError(f"width is {self.width}; needs a multiple of 16, so that 16:9 comes out whole")
        if self.samples * self.period > LONGEST:
            lasts = f"{self.samples} samples every {self.period} s are {self.samples * self.period:.0f} s"
            raise ValueError(f"{lasts}; a scene can last {LONGEST:.0f} s at most")


def make_world(out: str | Path, settings: WorldSettings = WorldSettings(), workers: int = 2, progress=None) -> None:
    """Writes a generated world in nuScenes format to a folder that does not exist yet, or is empty.

    The folder has the thirteen tables and `splits.json` (world_train, world_val, world_all) in `v1.0-mini/`, pictures
    and LiDAR scans in `samples/` and `sweeps/`, maps in `maps/` (`expansion/` as nuScenes has it, `markings/` with what
    nuScenes lacks: see `records`), depth of every picture in `depth/` (see `read_depth`), and `summary.json`. The same
    settings give the same bytes. Each scene has a town of its own, and towns of validation lie on a map of their own.

    Args:
        out: the folder to make.
        settings: how much, and from which seed.
        workers: processes; 0 = in this one.
        progress: called with (samples done, samples in all).

    Raises:
        FileExistsError: `out` exists and is not empty.
    """
    with fresh_folder(out) as folder:
        cameras = default_cameras(settings.width)
        scenes, counts = _render(folder, settings, cameras, workers, progress)
        tables = Tables(settings.seed, cameras, settings.samples, settings.period, settings.sweeps)
        places = {}
        for scene in scenes:
            tables.add_scene(scene, counts[scene.index])
            places.setdefault(scene.place, []).append(scene)
        for place, scenes in places.items():
            tables.add_map(place, [scene.index for scene in scenes])
            _write_map(folder, settings, place, scenes, tables.rows["map"][-1]["filename"])
        names = {index: scene_name(index) for index in range(settings.scenes)}
        splits = {
            "world_train": [name for index, name in names.items() if not is_validation(index)],
            "world_val": [name for index, name in names.items() if is_validation(index)],
            "world_all": list(names.values()),
        }
        for table, rows in {**tables.rows, "splits": splits}.items():
            write_json(folder / VERSION / f"{table}.json", rows)
        write_json(folder / "summary.json", {"settings": asdict(settings), **summarise(folder, VERSION)})


@contextmanager
def fresh_folder(out: str | Path):
    """A temporary folder beside `out` that takes its place when all went well, and is removed when not."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _render(folder, settings, cameras, workers, progress):
    """Every scene, and for each its samples' counts. A scene takes as long to build as some samples to render, so where
    there are scenes enough for every process, each has one alone."""
    size = settings.samples if settings.scenes >= 4 * workers else CHUNK
    chunks = [
        (index, range(first, min(first + size, settings.samples)))
        for index in range(settings.scenes)
        for first in range(0, settings.samples, size)
    ]
    tasks = [(folder, settings, cameras, index, samples) for index, samples in chunks]
    results = run_tasks(_render_chunk, tasks, workers, progress, [len(samples) for _, samples in chunks])
    scenes, counts = [], [[] for _ in range(settings.scenes)]
    for (index, _), (scene, found) in zip(chunks, results):
        scenes += [scene] if scene else []
        counts[index] += found
    return scenes, counts


@lru_cache(maxsize=2)
def _scene(settings: WorldSettings, index: int) -> Scene:
    return Scene(settings.seed, index, settings.samples, settings.period, settings.town)


def _render_chunk(folder: Path, settings: WorldSettings, cameras: list[Camera], index: int, samples: range):
    """Writes the files of some samples; returns the scene, with its first samples only, and their counts of LiDAR
    points and pixels for each actor."""
    scene = _scene(settings, index)
    by_name = {camera.name: camera for camera in cameras}
    actors = len(scene.actors)
    counts = {k: {name: np.zeros(actors, dtype=np.int64) for name in ("lidar", "visible", "alone")} for k in samples}
    for k, channel, t, key_frame in shots(cameras, settings.samples, settings.period, settings.sweeps):
        if k not in samples:
            continue
        name = file_name(settings.seed, index, channel, t, key_frame)
        if channel == LIDAR:
            points = scan(scene, t, folder / name)
            if key_frame:
                counts[k]["lidar"] = count_points(scene, t, points)
        else:
            visible, alone = photograph(scene, by_name[channel], t, folder / name, folder / depth_name(name))
            counts[k]["visible"] += visible
            counts[k]["alone"] += alone
    return scene if 0 in samples else None, list(counts.values())


def _write_map(folder, settings, place, scenes, mask_name):
    (folder / "maps").mkdir(exist_ok=True)
    map_mask(scenes).save(folder / mask_name, compress_level=1)

    def token(kind, key):
        return make_token(settings.seed, f"map/{place}/{kind}", key)

    write_json(folder / "maps" / "expansion" / f"{PLACES[place]}.json", map_expansion(scenes, token))
    write_json(folder / "maps" / "markings" / f"{PLACES[place]}.json", markings_record(scenes))
