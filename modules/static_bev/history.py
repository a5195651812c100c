"""What the car saw 0.7, 1.9 and 3.3 seconds ago: bird's-eye-view features, found by their timestamps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..history import narrowed
from ..rig import RigFrame
from ..settings import Count, NonNegative, Positive

ABSENT = ""  # the scene of a frame that stands for none
_MICROSECONDS = 1_000_000
_DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, int8=torch.int8)


@dataclass
class HistoryConfig:
    """Settings of a `HistoryFeatureManager`."""

    intervals: tuple[Positive, ...] = (0.7, 1.9, 3.3)  # seconds into the past that are asked for
    tolerance: NonNegative = 0.1  # seconds by which a frame may be older or newer
    frames: Count = 40  # kept at most
    spacing: NonNegative = 0.0  # seconds: a frame nearer to the one before it isn't kept; up to 2 · tolerance finds all
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"  # int8: with a scale for each map and channel

    def validate(self) -> None:
        if list(self.intervals) != sorted(set(self.intervals)):
            raise ValueError(f"intervals are {self.intervals}, need to rise")
        if self.spacing > 2 * self.tolerance:
            needed = f"at most {2 * self.tolerance:g}, twice the tolerance"
            raise ValueError(f"spacing is {self.spacing:g}, needs {needed}, or an interval may find nothing")


@dataclass(frozen=True, eq=False)
class History:
    """What was found for each of K intervals.

    Args:
        features: (B, K, C, H, W), each in the ego frame of its own moment; zeros where nothing was found. No gradient.
        found: (B, K) bool on the CPU.
        then_T_now: (B, K, 4, 4) float64 on the CPU, from the present ego frame to the past one; identity where nothing
            was found.
        ages: (B, K) float64 seconds on the CPU, NaN where nothing was found.
    """

    features: torch.Tensor
    found: torch.Tensor
    then_T_now: torch.Tensor
    ages: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """One past moment of a batch."""

    stored: torch.Tensor  # (B, C, H, W)
    scale: torch.Tensor | None  # (B, C, 1, 1)
    times: tuple[int, ...]  # microseconds
    scenes: tuple[str, ...]
    world_T_ego: torch.Tensor  # (B, 4, 4) float64
    alive: tuple[bool, ...]  # whether a sample may still read it


class HistoryFeatureManager:
    """Keeps the features of past moments as long as an interval can still ask for them.

    For each moment: `pick`, then `push`. Times are compared as whole microseconds, so a frame that is exactly one
    tolerance away is found. A sample whose scene changes or whose time does not advance loses its history; the others
    of the batch keep theirs.

    Args:
        config: see `HistoryConfig`.
    """

    def __init__(self, config: HistoryConfig):
        config.validate()
        self.config = config
        self._intervals = [microseconds(interval) for interval in config.intervals]
        self._tolerance = microseconds(config.tolerance) + 1
        self._kept: list[_Kept] = []  # newest first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are kept."""
        tensors = [x for kept in self._kept for x in (kept.stored, kept.scale) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def push(self, features: torch.Tensor, frame: RigFrame) -> None:
        """Adds a moment and forgets what no interval can ask for any more.

        Args:
            features: (B, C, H, W) in the ego frame of `frame`. Copied, detached, narrowed.
            frame: the rig at this moment. A sample whose scene is `ABSENT` has no frame here.
        """
        if features.ndim != 4 or len(features) != frame.batch_size:
            needed = f"({frame.batch_size}, C, H, W)"
            raise ValueError(f"HistoryFeatureManager: features has shape {tuple(features.shape)}, needs {needed}")
        if self._kept and self._kept[0].stored.shape != features.shape:
            self.clear()
        times = tuple(map(microseconds, frame.timestamp.tolist()))
        self._kept = [past for kept in self._kept if any((past := self._aged(kept, times, frame.scene)).alive)]
        alive = tuple(scene != ABSENT for scene in frame.scene)
        if self._is_too_near(times, alive):
            return
        stored, scale = narrowed(features, _DTYPES[self.config.dtype])
        self._kept.insert(0, _Kept(stored, scale, times, frame.scene, frame.world_T_ego.cpu().clone(), alive))
        del self._kept[self.config.frames :]

    def pick(self, frame: RigFrame, like: torch.Tensor) -> History:
        """For every interval the frame that is nearest to it, within the tolerance.

        Args:
            frame: the present.
            like: (B, C, H, W) the present features, whose dtype and device the result has.
        """
        count, times = len(self._intervals), list(map(microseconds, frame.timestamp.tolist()))
        features = like.new_zeros(like.shape[0], count, *like.shape[1:])
        found = torch.zeros(frame.batch_size, count, dtype=torch.bool)
        then_T_now = torch.eye(4, dtype=torch.float64).repeat(frame.batch_size, count, 1, 1)
        ages = torch.full((frame.batch_size, count), torch.nan, dtype=torch.float64)
        for row, (now, scene) in enumerate(zip(times, frame.scene)):
            own = [k for k in self._kept if k.alive[row] and k.scenes[row] == scene and k.times[row] < now]
            for place, interval in enumerate(self._intervals):
                best = min(own, key=lambda kept: abs(now - kept.times[row] - interval), default=None)  # noqa: B023
                if best is None or abs(now - best.times[row] - interval) > self._tolerance:
                    continue
                values = best.stored[row].to(like)
                features[row, place] = values if best.scale is None else values * best.scale[row].to(like)
                found[row, place], ages[row, place] = True, (now - best.times[row]) / _MICROSECONDS
                then_T_now[row, place] = torch.linalg.inv(best.world_T_ego[row]) @ frame.world_T_ego[row].cpu()
        return History(features, found, then_T_now, ages)

    def _aged(self, kept, times, scenes):
        """What is kept, without samples that can't read it any more: too old, of another scene, time turned back."""
        oldest = self._intervals[-1] + self._tolerance
        alive = (
            was and (scene == ABSENT or (scene == then and 0 < now - time <= oldest))
            for was, now, time, scene, then in zip(kept.alive, times, kept.times, scenes, kept.scenes)
        )
        return replace(kept, alive=tuple(alive))

    def _is_too_near(self, times, alive):
        """Whether no sample needs this moment, as each has one that is near enough in time."""
        if not self.config.spacing or not self._kept:
            return False
        last, spacing = self._kept[0], microseconds(self.config.spacing)
        return not any(
            here and not (there and now - then < spacing)
            for here, there, now, then in zip(alive, last.alive, times, last.times)
        )


def microseconds(seconds: float) -> int:
    """Whole microseconds, as nuScenes' tables have them."""
    return round(seconds * _MICROSECONDS)


def check_intervals(config: HistoryConfig, times: Sequence[Sequence[float]]) -> None:
    """ValueError where an interval finds no partner for any moment of any scene: it could never be trained.

    Args:
        config: intervals and tolerance.
        times: for each scene the seconds of its moments, ascending.
    """
    tolerance = microseconds(config.tolerance) + 1
    for interval in config.intervals:
        wanted = microseconds(interval)
        for scene in times:
            stamps = torch.tensor([microseconds(time) for time in scene], dtype=torch.int64)
            places = torch.searchsorted(stamps, stamps - wanted).clamp(max=max(len(stamps) - 1, 0))
            around = torch.stack([places, (places - 1).clamp(min=0)])
            age = stamps - stamps[around]
            if ((age > 0) & ((age - wanted).abs() <= tolerance)).any():
                break
        else:
            steps = [b - a for scene in times for a, b in zip(scene[:-1], scene[1:])]
            period = f"moments are {sorted(steps)[len(steps) // 2]:.3g} s apart" if steps else "scenes have one moment"
            longest = max((scene[-1] - scene[0] for scene in times if len(scene)), default=0.0)
            raise ValueError(
                f"history.intervals: no moment of the split has one {interval:g} s ± {config.tolerance:g} s before it "
                f"({period}, the longest scene is {longest:.3g} s)"
            )
