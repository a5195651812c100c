"""What nuScenes' CAN bus expansion says of the vehicle's own motion."""

from pathlib import Path

import numpy as np
import torch

from .moments import EgoState
from .tables import read_json

_FIELDS = ("vel", "accel", "rotation_rate")
_STALE = 0.5  # seconds from where a message says nothing about now


class PoseMessages:
    """The `pose` messages of a scene, about fifty a second.

    Args:
        file: `<root>/can_bus/<scene>_pose.json`.

    Raises:
        ValueError: it is missing or broken; one line.
    """

    def __init__(self, file: Path):
        rows = read_json(file)
        try:
            times = np.array([row["utime"] for row in rows], dtype=np.int64)
            values = np.array([[row[field] for field in _FIELDS] for row in rows], dtype=np.float64)
            if values.shape != (len(times), len(_FIELDS), 3) or not np.isfinite(values).all():
                raise ValueError("it needs messages with three finite numbers in vel, accel and rotation_rate")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} is no list of pose messages: {error}") from error
        order = np.argsort(times, kind="stable")
        self._times, self._values = times[order], torch.from_numpy(values[order])

    def before(self, time: int) -> EgoState | None:
        """The last message that is not after `time` (microseconds), None where none is near."""
        place = int(np.searchsorted(self._times, time, side="right")) - 1
        lag = (time - int(self._times[place])) * 1e-6 if place >= 0 else np.inf
        return EgoState(lag, *self._values[place]) if lag <= _STALE else None
