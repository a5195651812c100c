"""Stage 3: missing cameras borrow from present ones, with more care where the vehicle is about to drive."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import gated_fusion, trajectory_importance
from ...kernels.runtime.nvtx import annotate
from ..attention import CameraAttention
from ..maps import replace_maps, wanted_maps
from ..operations import OperationModule
from ..rig import NUSCENES_CAMERAS, RigFrame
from ..settings import Count, Positive
from ..topology import Topology


@dataclass
class PlanningConfig:
    """Settings of stage 3."""

    enable: bool = True  # False leaves the stage out of the cascade
    topology: Literal["global", "neighbours"] = "global"  # who may help whom
    heads: Count = 8  # of the attention
    kv_downsample: Count = 4  # side of the square of cells that is averaged into one key
    sigma: Positive = 64.0  # width of the trajectory's importance, image pixels
    # Which trajectory guides: none; predicted = the motion since the last moment goes on, which inference has too;
    # ground_truth = the one that was driven, in training alone.
    trajectory_source: Literal["none", "predicted", "ground_truth"] = "ground_truth"


def project_trajectory(trajectory: torch.Tensor, frame: RigFrame, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects an ego trajectory onto every camera's feature map.

    Args:
        trajectory: (B, T, 2) metres in the ego frame, on the ground (z = 0).
        frame: the rig at this moment.
        stride: image pixels per cell.

    Returns:
        points (B, V, T, 2) float32 in cells, and valid (B, V, T) bool: in front of the camera by at least 0.1 m.
    """
    ground = F.pad(F.pad(trajectory.to(frame.image_T_ego), (0, 1)), (0, 1), value=1.0)  # (B, T, 4): x, y, 0, 1
    u, v, depth = torch.einsum("bvij,btj->ibvt", frame.image_T_ego, ground)[:3]
    valid = depth > 0.1
    pixels = torch.stack([u, v], dim=-1) / depth.clamp(min=0.1)[..., None]
    return ((pixels + 0.5) / stride - 0.5).float(), valid


class CrossCameraAttention(OperationModule):
    """Lets missing cameras attend to the present ones of the same moment.

    Args:
        channels: C of the feature maps.
        config: topology, heads and kv_downsample are read. A camera never attends to itself, since it is missing.
        cameras: names of the V cameras in the order of the feature maps.
        backend: of the operations.
    """

    def __init__(
        self,
        channels: int,
        config: PlanningConfig,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        backend: str | None = None,
    ):
        super().__init__()
        self.kv_downsample = config.kv_downsample
        self.attention = CameraAttention(channels, len(cameras), heads=config.heads)
        self._table = Topology.named(config.topology, cameras).table(cameras)
        self.backend = backend

    def forward(
        self,
        features: torch.Tensor,
        missing: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Returns what the cameras at `index`, sample and camera (Nq,) each, borrow, (Nq, C, H, W), for features
        (B, V, C, H, W) and missing (B, V) bool. None = the missing ones, in the order of `missing.nonzero()`."""
        cameras = features.shape[1]
        sample, camera = wanted_maps(missing) if index is None else index
        listed = self._table.to(missing.device)[camera]  # (Nq, K)
        present = (listed >= 0) & ~missing[sample[:, None], listed.clamp(min=0)]
        block_table = torch.where(present, sample[:, None] * cameras + listed, -1)
        keys = F.avg_pool2d(features.flatten(0, 1), self.kv_downsample, ceil_mode=True, count_include_pad=False)
        key_camera = torch.arange(cameras, device=features.device).repeat(features.shape[0])
        return self.attention(features[sample, camera], camera, keys, key_camera, block_table)


class ScaleCompletion(OperationModule):
    """Completes one scale: attention, then a coarse network everywhere and a fine one on the trajectory, then a gate.

    Args:
        channels: C of the feature maps.
        stride: image pixels per cell.
        config: see `PlanningConfig`.
        cameras: names of the V cameras in the order of the feature maps.
        backend: of the operations.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        config: PlanningConfig,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        backend: str | None = None,
    ):
        super().__init__()
        self.stride, self.sigma = stride, config.sigma / stride
        self.attention = CrossCameraAttention(channels, config, cameras=cameras)
        self.coarse = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1))
        self.fine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
        )
        self.gate = nn.Conv2d(2 * channels, 1, 3, padding=1)
        for layer in (self.attention.attention.out, self.coarse[-1], self.fine[-1]):  # starts from what came in
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.backend = backend

    def forward(
        self,
        features: torch.Tensor,
        missing: torch.Tensor,
        trajectory: torch.Tensor | None,
        frame: RigFrame,
        *,
        every: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Completes the missing cameras' maps of features (B, V, C, H, W), missing (B, V) bool; returns them, and the
        importance (B, V, H, W) of the trajectory (B, T, 2), metres, or None without one. `every` works on all maps."""
        index = wanted_maps(missing, every)
        importance = self._importance(features, trajectory, frame)
        run = lambda maps: self._complete(maps, features, missing, importance, index)  # noqa: E731
        return replace_maps(features, index, run, only=missing if every else None), importance

    def _importance(self, features, trajectory, frame):
        """The importance of the trajectory for each cell, (B, V, H, W), or None without one."""
        if trajectory is None:
            return None
        points, valid = (
            t.flatten(0, 1).to(features.device) for t in project_trajectory(trajectory, frame, self.stride)
        )
        size = features.shape[-2:]
        importance = trajectory_importance(points, valid, size, sigma=self.sigma, backend=self.backend)
        return importance.unflatten(0, features.shape[:2])

    def _complete(self, original, features, missing, importance, index):
        """The maps (Nq, C, H, W) of the cameras at `index`, completed."""
        borrowed = original + self.attention(features, missing, index)
        coarse = borrowed + self.coarse(borrowed)
        fine = None if importance is None else borrowed + self.fine(borrowed)
        on_missing = None if importance is None else importance[index][:, None]
        gate_logits = self.gate(torch.cat([original, coarse], dim=1))
        return gated_fusion(original, coarse, gate_logits, fine=fine, importance=on_missing, backend=self.backend)


class PlanningGuidedCompletion(OperationModule):
    """Completes every scale of missing cameras from present ones (design documents' `PlanningGuidedCompletion`).

    With a trajectory (training) cells near it take the fine network's proposal; without one (inference) only the coarse
    path runs. Present cameras return bit for bit.

    Args:
        strides: of the scales.
        channels: C of every scale.
        config: see `PlanningConfig`; None = its defaults.
        cameras: names of the V cameras in the order of the feature maps.
        backend: of the operations, see `rigfuse.kernels`; may be set later too.
    """

    def __init__(
        self,
        strides: tuple[int, ...],
        channels: int,
        config: PlanningConfig | None = None,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        backend: str | None = None,
    ):
        super().__init__()
        config = config or PlanningConfig()
        self.scales = nn.ModuleList(ScaleCompletion(channels, stride, config, cameras=cameras) for stride in strides)
        self.backend = backend

    def forward(
        self,
        features: list[torch.Tensor],
        missing: torch.Tensor,
        frame: RigFrame,
        trajectory: torch.Tensor | None = None,
        *,
        every: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Completes the missing cameras' maps of every scale.

        Args:
            features: for each scale (B, V, C, H, W); get gradients.
            missing: (B, V) bool.
            frame: the rig at this moment.
            trajectory: (B, T, 2) metres in the ego frame; None = there is none.
            every: works on the maps of every camera and keeps those of the missing ones, as a fixed graph needs.

        Returns:
            the features, and the importance maps (B, V, H, W) of each scale or None without a trajectory.
        """
        if not every and not missing.any():
            return features, None
        with annotate("planning_guided_completion"):
            pairs = [scale(x, missing, trajectory, frame, every=every) for scale, x in zip(self.scales, features)]
        completed, importance = (list(column) for column in zip(*pairs))
        return completed, importance if trajectory is not None else None
