"""What the rig saw a moment ago: feature maps, which cameras were there, and the geometry."""

from collections import deque
from dataclasses import dataclass, replace

import torch

from .rig import RigFrame


@dataclass(frozen=True, eq=False)
class HistoryFrame:
    """One past moment of a batch.

    Args:
        features: (B, V, C, H, W), no gradient.
        available: (B, V) bool on the CPU. False where the camera was missing then, and in every sample whose history
            was cleared since: those features must not be read.
        frame: the rig then.
    """

    features: torch.Tensor
    available: torch.Tensor
    frame: RigFrame


class HistoryQueue:
    """The last `length` moments of every sample of a batch.

    For each moment: `prepare`, read `frames`, `push`. State lives outside any state dict, and nothing stored is ever
    written to, so what autograd saved from it stays valid.

    Args:
        length: moments kept.
        dtype: dtype the features are stored in, e.g. torch.bfloat16; None = as they come.
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

    def prepare(self, frame: RigFrame, features: torch.Tensor) -> None:
        """Forgets what cannot be the past of `frame`; a second time it changes nothing.

        A sample whose scene changed, whose last moment is more than `max_gap` seconds ago, or whose time did not
        advance (an equal timestamp is the present seen twice, not a past) loses its history; the others keep theirs.
        Another shape of the features (batch, cameras, channels, map size) or another device clears everything.
        """
        if not self._frames:
            return
        newest = self._frames[0]
        if newest.features.shape != features.shape or newest.features.device != features.device:
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
        stored = features.detach().to(self.dtype or features.dtype, copy=True)
        self._frames.appendleft(HistoryFrame(stored, ~missing.cpu(), frame.clone()))
