"""What the versions of stage 1 have in common: settings, cameras, topology and history."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..history import HistoryQueue, PyramidHistory
from ..operations import OperationModule
from ..rig import RigFrame
from ..settings import Count, NonNegative, Positive
from ..topology import Topology


@dataclass
class TemporalConfig:
    """Settings of stage 1."""

    enable: bool = True  # False leaves the stage out: the input returns and no history is kept
    topology: Literal["global", "neighbours", "own"] = "global"  # whom a missing camera attends to: see Topology
    heads: Count = 8  # of the attention
    depths: tuple[Positive, ...] = (10.0, 30.0)  # metres of the warp; each cell says how much each counts
    queue_length: Count = 4  # moments of history
    kv_downsample: Count = 4  # side of the square of warped cells that is averaged into one key
    stride: Count = 32  # image pixels per feature cell
    motion: bool = True  # V1 and V2: False looks at the same cell of the past, as if nothing had moved
    max_offset: NonNegative = 2.0  # bound of the learned refinement of the warp, cells
    max_gap: Positive = 2.0  # seconds between moments after which a history is stale
    history_dtype: Literal["float32", "float16", "bfloat16", "int8"] | None = None  # of stored history; None = as it is
    geometry: bool = False  # V3: every source straight into the missing camera's view, at every scale
    moments: Count = 1  # V3: the newest of each source camera that are warped to every cell; keys are of all
    grid: tuple[Count, Count] = (28, 50)  # V3: cells (height, width) of what each camera usually sees
    history_pool: Count = 1  # V3: side of the square of cells that is averaged into one before it is stored


class TemporalStage(OperationModule):
    """What every stage 1 is: the cameras and whom each attends to, and the history that calls in a row build up.

    A version defines `complete`.

    Args:
        channels: C of the feature maps.
        config: see `TemporalConfig`.
        cameras: names of the V cameras in the order of the feature maps.
        topology: which cameras a missing one attends to; None = `config.topology`.
        strides: of the scales, where it takes every one.
    """

    every_scale = False  # whether it takes and gives the maps of every scale, as a list, or those of its own

    def __init__(
        self,
        channels: int,
        config: TemporalConfig,
        *,
        cameras: tuple[str, ...],
        topology: Topology | None,
        strides: tuple[int, ...] = (),
    ):
        super().__init__()
        self.channels, self.cameras, self.enable = channels, tuple(cameras), config.enable
        self.stride, self.strides = config.stride, tuple(strides) or (config.stride,)
        self.topology = topology or Topology.named(config.topology, self.cameras)
        self._table = self.topology.table(self.cameras)
        self._queue = dict(
            length=config.queue_length,
            dtype=getattr(torch, config.history_dtype) if config.history_dtype else None,
            max_gap=config.max_gap,
        )
        self._history_pool = config.history_pool
        self.history = self.new_history()

    def new_history(self) -> HistoryQueue | PyramidHistory:
        """An empty history of the length and dtype that the settings say."""
        if self.every_scale:
            return PyramidHistory(len(self.strides), pool=self._history_pool, **self._queue)
        return HistoryQueue(**self._queue)

    def helpful(self, missing: torch.Tensor) -> torch.Tensor:
        """Says whose history can help the missing cameras: (B, V) bool for `missing` (B, V) bool, on the CPU."""
        attends = (self._table[:, :, None] == torch.arange(len(self.cameras))).any(dim=1)  # (V, V)
        return (missing[:, :, None] & attends).any(dim=1)

    def reset_history(self) -> None:
        """Forgets the history of every sample."""
        self.history.clear()

    def forward(self, features, missing: torch.Tensor, frame: RigFrame):
        """Completes the missing cameras of one moment from `history`, which then remembers the moment.

        Args:
            features: (B, V, C, H, W) at `stride`, or with `every_scale` one for each; gets gradients (its history does
                not). Maps in channels_last memory format are the fast ones.
            missing: (B, V) bool, True = this camera's image is absent.
            frame: the rig at this moment.

        Returns:
            `features` with the missing cameras' maps completed.
        """
        completed, _ = self.complete(features, missing, frame, self.history)
        if self.enable:
            self.history.push(features, missing, frame)
        return completed

    def _validate(self, features, missing, frame):
        if features.ndim != 5 or features.shape[1:3] != (len(self.cameras), self.channels):
            needed = f"(B, {len(self.cameras)}, {self.channels}, H, W)"
            raise ValueError(f"features has shape {tuple(features.shape)}, needs {needed}")
        if missing.dtype != torch.bool:
            raise TypeError(f"missing is {str(missing.dtype).removeprefix('torch.')}, needs bool")
        for name, shape in dict(missing=missing.shape, frame=frame.image_T_ego.shape[:2]).items():
            if shape != features.shape[:2]:
                raise ValueError(f"{name} has shape {tuple(shape)}, needs (B, V) = {tuple(features.shape[:2])}")


def make_decoder(channels: int) -> nn.Sequential:
    """What refines attended features (N, C, H, W): a depthwise convolution and a two-layer network in each cell."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.GroupNorm(1, channels),
        nn.Conv2d(channels, 2 * channels, 1),
        nn.GELU(),
        nn.Conv2d(2 * channels, channels, 1),
    )
