"""The ground truth of driving, by sample: map lines, futures of agents and of the ego car; and its cache."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ..distributed import on_first_rank
from .cache import ArrayCache, open_cache, tables_digest, write_cache
from .futures import agent_futures, ego_future, ego_velocity
from .map_truth import MapLines, VectorMap, scene_locations
from .moments import Moment
from .nuscenes import nuscenes_drives, open_nuscenes


@dataclass(frozen=True)
class TruthConfig:
    """How far truth reaches.

    Args:
        map_size: metres along and across the ego car, see `VectorMap.lines`.
        agent_steps, ego_steps: of the futures.
        period: seconds of a step.
    """

    map_size: tuple[float, float] = (60.0, 30.0)
    agent_steps: int = 12
    ego_steps: int = 6
    period: float = 0.5


@dataclass(frozen=True, eq=False)
class DrivingTruth:
    """The truth of one sample, in its reference ego frame.

    Args:
        map: the lines around the car.
        agent_paths: (G, agent_steps, 2) float64, rows as `Moment.boxes`; see `agent_futures`.
        agent_mask: (G, agent_steps) bool.
        ego_path, ego_yaw, ego_mask: (ego_steps, 2), (ego_steps,) float64 and (ego_steps,) bool, see `EgoFuture`.
        command: place in `COMMANDS`.
        velocity: (2,) float64 m/s, see `ego_velocity`.
    """

    map: MapLines
    agent_paths: np.ndarray
    agent_mask: np.ndarray
    ego_path: np.ndarray
    ego_yaw: np.ndarray
    ego_mask: np.ndarray
    command: int
    velocity: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns it as `write_cache` takes it; `from_arrays` is the way back."""
        arrays = {name: np.atleast_1d(getattr(self, name)) for name in self.__dataclass_fields__ if name != "map"}
        points = np.concatenate([np.empty((0, 2)), *self.map.lines])
        lengths = np.array([len(line) for line in self.map.lines], dtype=np.int64)
        return arrays | {"map_labels": self.map.labels, "map_lengths": lengths, "map_points": points}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "DrivingTruth":
        arrays = dict(arrays)
        labels, lengths, points = (arrays.pop(f"map_{name}") for name in ("labels", "lengths", "points"))
        lines = np.split(points, lengths.cumsum()[:-1]) if len(lengths) else []
        return cls(MapLines(labels, lines), command=int(arrays.pop("command")[0]), **arrays)


def driving_truth(moments: list[Moment], index: int, vector_map: VectorMap, config: TruthConfig) -> DrivingTruth:
    """Returns the truth at `moments[index]`; `moments` are all key frames of its scene."""
    paths, mask = agent_futures(moments, index, config.agent_steps, config.period)
    ego = ego_future(moments, index, config.ego_steps, config.period)
    lines = vector_map.lines(moments[index].world_T_ego, config.map_size)
    velocity = ego_velocity(moments, index)
    return DrivingTruth(lines, paths, mask, ego.path, ego.yaw, ego.mask, ego.command, velocity)


def truth_cache(
    folder: str | Path, root: str | Path, version: str | None, split: str | None, config: TruthConfig = TruthConfig()
) -> ArrayCache:
    """Returns the truth of every sample of a split: sample token → what `DrivingTruth.from_arrays` takes.

    It is read from `folder`, or made and written there first. With several ranks let one of them make it.

    Args:
        folder: of caches.
        root, version, split: as for `nuscenes_drives`.
        config: see `TruthConfig`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `nuscenes_drives`, `VectorMap.load` and `open_cache`.
    """
    key = truth_key(root, version, config)
    name = split or "all-scenes"
    try:
        return open_cache(folder, name, key)
    except FileNotFoundError:
        write_cache(folder, name, key, _samples(root, version, split, config))
        return open_cache(folder, name, key)


def truth_key(root: str | Path, version: str | None, config: TruthConfig) -> dict:
    """What the truth of a root follows from."""
    return {"settings": asdict(config), "tables": tables_digest(root, version)}


def truth_for_all_ranks(config: "CachedData", split: str | None, kept: TruthConfig) -> ArrayCache:
    """`truth_cache` of the data's root in its cache folder; where there are several ranks, the first one makes it."""
    found = partial(truth_cache, config.cache, config.root, config.version, split, kept)
    on_first_rank(found)
    return found()


class CachedData(Protocol):
    """What the data settings of a task with truth have."""

    root: str
    version: str | None
    cache: str


def _samples(root, version, split, config) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    locations, maps = scene_locations(open_nuscenes(root, version)), {}
    for drive in nuscenes_drives(root, version, split):
        location = locations[drive.name]
        if location not in maps:
            maps[location] = VectorMap.load(root, location)
        moments = list(drive)
        for index, moment in enumerate(moments):
            yield moment.token, driving_truth(moments, index, maps[location], config).arrays()
