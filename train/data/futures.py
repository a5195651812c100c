"""Futures of agents and of the ego car, from the annotations and poses of later key frames.

Everything is in the reference ego frame of the present (x ahead, y left, metres), float64. `moments` are all the key
frames of one scene in order. A step is `period` seconds, whatever the time between key frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .moments import Box, Moment

COMMANDS = ("right", "left", "straight")  # SparseDrive's order
_ASIDE = 2.0  # metres sideways, at the end of the known path, from which on it is a turn


@dataclass(frozen=True, eq=False)
class EgoFuture:
    """The path that the ego car drives.

    Args:
        path: (steps, 2) positions of the ego frame's origin, 0 where unknown.
        yaw: (steps,) radians against the present, 0 where unknown.
        mask: (steps,) bool, which are known: a scene ends.
    """

    path: np.ndarray
    yaw: np.ndarray
    mask: np.ndarray

    def path_of(self, point: tuple[float, float]) -> np.ndarray:
        """Returns (steps, 2) positions of a point of the car, relative to where it is now; `point` in its ego frame.

        The path of the LiDAR (0.94 m before nuScenes' origin) is what published plans and their figures are about.
        """
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        turned = np.stack([cos * point[0] - sin * point[1], sin * point[0] + cos * point[1]], axis=1)
        return np.where(self.mask[:, None], self.path + turned - np.asarray(point), 0.0)

    @property
    def command(self) -> int:
        """Place in `COMMANDS`: a turn if the last known position is 2 m or more to that side."""
        known = np.flatnonzero(self.mask)
        aside = self.path[known[-1], 1] if len(known) else 0.0
        return 0 if aside <= -_ASIDE else 1 if aside >= _ASIDE else 2


def ego_future(moments: Sequence[Moment], index: int, steps: int = 6, period: float = 0.5) -> EgoFuture:
    """The driven path from `moments[index]` on."""
    ego_T_world = np.linalg.inv(_pose(moments[index]))
    path, yaw, mask = np.zeros((steps, 2)), np.zeros(steps), np.zeros(steps, dtype=bool)
    for step, later in enumerate(_later(moments, index, steps, period)):
        now_T_then = ego_T_world @ _pose(later)
        path[step], yaw[step], mask[step] = now_T_then[:2, 3], np.arctan2(now_T_then[1, 0], now_T_then[0, 0]), True
    return EgoFuture(path, yaw, mask)


def ego_velocity(moments: Sequence[Moment], index: int) -> np.ndarray:
    """Returns the velocity (2,) in m/s of the ego frame's origin since the key frame before; NaN for the first one."""
    if index == 0:
        return np.full(2, np.nan)
    before, now = moments[index - 1], moments[index]
    moved = np.linalg.inv(_pose(now)) @ _pose(before)
    return -moved[:2, 3] / (now.timestamp - before.timestamp)


def agent_futures(
    moments: Sequence[Moment], index: int, steps: int = 12, period: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions (G, steps, 2) of `moments[index].boxes` at the steps to come, 0 where unknown, and the
    (G, steps) bool mask of what is known: a box of the same instance is annotated there."""
    boxes, ego_T_world = moments[index].boxes, np.linalg.inv(_pose(moments[index]))
    rows = {box.instance: row for row, box in enumerate(boxes)}
    paths, mask = np.zeros((len(boxes), steps, 2)), np.zeros((len(boxes), steps), dtype=bool)
    for step, later in enumerate(_later(moments, index, steps, period)):
        for box in later.boxes:
            row = rows.get(box.instance)
            if row is not None:
                paths[row, step] = (ego_T_world[:3, :3] @ box.center.numpy() + ego_T_world[:3, 3])[:2]
                mask[row, step] = True
    return paths, mask


def in_agent_frames(paths: np.ndarray, centres: np.ndarray, yaws: np.ndarray) -> np.ndarray:
    """Returns paths (G, …, 2) as their agents see them: relative to `centres` (G, 2), x along `yaws` (G,)."""
    cos, sin = np.cos(yaws), np.sin(yaws)
    turn = np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)  # (G, 2, 2) ego_T_agent
    ahead = (len(centres), *(1,) * (paths.ndim - 2), 2)
    return np.einsum("g...i,gij->g...j", paths - centres.reshape(ahead), turn)


def future_boxes(
    moments: Sequence[Moment],
    index: int,
    steps: int = 6,
    period: float = 0.5,
    counts: Callable[[Box], bool] = lambda box: True,
) -> list[np.ndarray]:
    """Returns for each step the boxes (n, 7) annotated then: x, y, z, length, width, height, yaw, in the ego frame of
    the present. Steps after the end of the scene have none. `counts` chooses the boxes."""
    ego_T_world = np.linalg.inv(_pose(moments[index]))
    result = [np.zeros((0, 7)) for _ in range(steps)]
    for step, later in enumerate(_later(moments, index, steps, period)):
        rows = []
        for box in filter(counts, later.boxes):
            ego_T_box = ego_T_world @ box.frame_T_box.numpy()
            rows.append([*ego_T_box[:3, 3], *box.size, np.arctan2(ego_T_box[1, 0], ego_T_box[0, 0])])
        result[step] = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return result


def _pose(moment):
    return np.asarray(moment.world_T_ego, dtype=np.float64)


def _later(moments, index, steps, period):
    """The moments of the steps to come, as many as the scene has: key frames are counted, as everywhere, because their
    clock is not exact."""
    if len(moments) < 2:
        return []
    between = np.median(np.diff([moment.timestamp for moment in moments]))
    stride = round(period / between)
    if stride < 1 or abs(stride * between - period) > 0.1 * period:
        raise ValueError(f"key frames of {moments[0].scene} are {between:.3f} s apart; steps of {period} s do not fit")
    return [
        moments[place] for place in range(index + stride, index + steps * stride + 1, stride) if place < len(moments)
    ]
