"""What the rig saw a moment ago: feature maps, which cameras were there, and the geometry."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .rig import RigFrame


@dataclass(frozen=True, eq=False)
class HistoryFrame:
    """One past moment of a batch.

    Args:
        stored: (B, V, C, H, W), no gradient; in units of `scale` where that is not None.
        available: (B, V) bool on the CPU. False where the camera was missing then, and in every sample whose history
            was cleared since: those features must not be read.
        frame: the rig then.
        scale: (B, V, C, 1, 1), of features that are stored as whole numbers: what 1 stands for in each channel of a
            map.
    """

    stored: torch.Tensor
    available: torch.Tensor
    frame: RigFrame
    scale: torch.Tensor | None = None

    @property
    def features(self) -> torch.Tensor:
        """(B, V, C, H, W), no gradient."""
        return self.stored if self.scale is None else self.stored.to(self.scale.dtype) * self.scale

    def maps(self, index: torch.Tensor) -> torch.Tensor:
        """The maps (N, C, H, W) at `index` (N,) = sample · V + camera."""
        index = index.to(self.stored.device)
        maps = self.stored.flatten(0, 1)[index]
        return maps if self.scale is None else maps.to(self.scale.dtype) * self.scale.flatten(0, 1)[index]


class HistoryQueue:
    """The last `length` moments of every sample of a batch.

    For each moment: `prepare`, read `frames`, `push`. State lives outside any state dict, and nothing stored is ever
    written to, so what autograd saved from it stays valid.

    Args:
        length: moments kept.
        dtype: dtype the features are stored in, e.g. torch.bfloat16; None = as they come. torch.int8 has one scale for
            each map and channel.
        max_gap: seconds between consecutive moments after which a sample's history is stale.
    """

    def __init__(self, length: int, dtype: torch.dtype | None = None, max_gap: float = 2.0):
        if length < 1:
            raise ValueError(f"HistoryQueue: length is {length}, needs at least 1")
        if not max_gap > 0:
            raise ValueError(f"HistoryQueue: max_gap is {max_gap}, needs a positive number of seconds")
        self.dtype, self.max_gap = dtype, max_gap
        self._frames: deque[HistoryFrame] = deque(maxlen=length)

    @property
    def length(self) -> int:
        """How many moments are kept."""
        return self._frames.maxlen

    @property
    def frames(self) -> list[HistoryFrame]:
        """The moments, newest first."""
        return list(self._frames)

    def clear(self) -> None:
        """Forgets everything."""
        self._frames.clear()

    def fill(self, frames: Iterable[HistoryFrame]) -> None:
        """Holds these moments, newest first, and no other."""
        self._frames = deque(frames, maxlen=self.length)

    def fork(self) -> "HistoryQueue":
        """A queue with the same moments, which goes on by itself. Nothing is copied: nothing stored is written to."""
        other = HistoryQueue(self.length, self.dtype, self.max_gap)
        other._frames.extend(self._frames)
        return other

    def prepare(self, frame: RigFrame, features: torch.Tensor) -> None:
        """Forgets what cannot be the past of `frame`; a second time it changes nothing.

        A sample whose scene changed, whose last moment is more than `max_gap` seconds ago, or whose time did not
        advance (an equal timestamp is the present seen twice, not a past) loses its history; the others keep theirs.
        Another shape of the features (batch, cameras, channels, map size) or another device clears everything.
        """
        if not self._frames:
            return
        newest = self._frames[0]
        if newest.stored.shape != features.shape or newest.stored.device != features.device:
            self.clear()
            return
        same_scene = torch.tensor([now == then for now, then in zip(frame.scene, newest.frame.scene)])
        gap = (frame.timestamp - newest.frame.timestamp).cpu()
        continues = same_scene & (gap > 0) & (gap <= self.max_gap)
        if not continues.any():
            self.clear()
        elif not continues.all():
            kept = (replace(past, available=past.available & continues[:, None]) for past in self._frames)
            self._frames = deque(kept, maxlen=self.length)

    def push(self, features: torch.Tensor, missing: torch.Tensor, frame: RigFrame) -> None:
        """Adds a moment; the oldest one leaves a full queue.

        Args:
            features: (B, V, C, H, W). Copied, as the caller may go on to write to it; detached, narrowed to `dtype`.
                The memory format of the maps stays.
            missing: (B, V) bool, True = this camera is absent, its features are not history.
            frame: the rig at this moment.
        """
        if features.ndim != 5:
            raise ValueError(f"HistoryQueue: features has shape {tuple(features.shape)}, needs (B, V, C, H, W)")
        if missing.dtype != torch.bool:
            raise TypeError(f"HistoryQueue: missing is {str(missing.dtype).removeprefix('torch.')}, needs bool")
        for name, shape in dict(missing=missing.shape, frame=frame.image_T_ego.shape[:2]).items():
            if shape != features.shape[:2]:
                got, needed = tuple(shape), tuple(features.shape[:2])
                raise ValueError(f"HistoryQueue: {name} has (batch, cameras) {got}, needs {needed}")
        self.prepare(frame, features)
        stored, scale = narrowed(features, self.dtype)
        self._frames.appendleft(HistoryFrame(stored, ~missing.cpu(), frame.clone(), scale))


class PyramidHistory:
    """A `HistoryQueue` for each scale of a feature pyramid; they remember and forget together.

    Args:
        scales: how many.
        pool: side of the square of cells that is averaged into one before it is stored.
        settings: of each queue.
    """

    def __init__(self, scales: int, *, pool: int = 1, **settings):
        self.queues, self.pool = [HistoryQueue(**settings) for _ in range(scales)], pool

    @property
    def length(self) -> int:
        """How many moments are kept."""
        return self.queues[0].length

    @property
    def frames(self) -> list[HistoryFrame]:
        """The moments at the first scale, newest first."""
        return self.queues[0].frames

    def clear(self) -> None:
        """Forgets everything."""
        for queue in self.queues:
            queue.clear()

    def fork(self) -> "PyramidHistory":
        """The same moments in queues that go on by themselves."""
        other = PyramidHistory(len(self.queues), pool=self.pool, length=self.length)
        other.queues = [queue.fork() for queue in self.queues]
        return other

    def prepare(self, frame: RigFrame, features: Sequence[torch.Tensor]) -> None:
        """Forgets what cannot be the past of `frame`, see `HistoryQueue.prepare`."""
        for queue, x in zip(self.queues, features, strict=True):
            queue.prepare(frame, x[..., :: self.pool, :: self.pool])  # as large as what is stored

    def push(self, features: Sequence[torch.Tensor], missing: torch.Tensor, frame: RigFrame) -> None:
        """Adds a moment at every scale, see `HistoryQueue.push`."""
        for queue, x in zip(self.queues, features, strict=True):
            queue.push(pooled(x, self.pool), missing, frame)


def narrowed(features: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies maps (..., C, H, W) to another dtype, detached; None = their own.

    torch.int8 has a scale for each map and channel, (..., C, 1, 1), which is what 1 stands for; others have none.
    """
    features, scale = features.detach(), None
    if dtype == torch.int8:
        scale = features.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12) / 127
        features = (features / scale).round()
    return features.to(dtype or features.dtype, copy=True), scale


def pooled(features: torch.Tensor, side: int) -> torch.Tensor:
    """Means of squares of cells, those at the border of what there is: (..., H, W) → (..., ⌈H/side⌉, ⌈W/side⌉)."""
    if side == 1:
        return features
    flat = F.avg_pool2d(features.flatten(0, -4), side, ceil_mode=True, count_include_pad=False)
    return flat.unflatten(0, features.shape[:-3])
