"""Stage 3: missing cameras borrow from present ones, with more care where the vehicle is about to drive."""

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import gated_fusion, trajectory_importance
from ...kernels.runtime.nvtx import annotate
from ..attention import CameraAttention
from ..maps import replace_maps
from ..rig import NUSCENES_CAMERAS, RigFrame
from ..topology import Topology


def project_trajectory(trajectory: torch.Tensor, frame: RigFrame, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An ego trajectory on every camera's feature map.

    Args:
        trajectory: (B, T, 2) metres in the ego frame, on the ground (z = 0).
        frame: the rig at this moment.
        stride: image pixels per cell.

    Returns:
        points (B, V, T, 2) float32 in cells, and valid (B, V, T) bool: in front of the camera by at least 0.1 m.
    """
    ground = F.pad(F.pad(trajectory.to(frame.image_T_ego.dtype), (0, 1)), (0, 1), value=1.0)  # (B, T, 4): x, y, 0, 1
    u, v, depth = torch.einsum("bvij,btj->ibvt", frame.image_T_ego, ground)[:3]
    valid = depth > 0.1
    pixels = torch.stack([u, v], dim=-1) / depth.clamp(min=0.1)[..., None]
    return ((pixels + 0.5) / stride - 0.5).float(), valid


class CrossCameraAttention(nn.Module):
    """Missing cameras attend to the present ones of the same moment: (B, V, C, H, W) → the missing maps.

    Args:
        channels, cameras, heads, kv_downsample, backend: as in `MotionCompensatedTemporalCompletion`.
        topology: who may help whom; a camera never attends to itself, since it is missing.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        topology: str | Topology = "global",
        heads: int = 8,
        kv_downsample: int = 4,
        backend: str | None = None,
    ):
        super().__init__()
        self.kv_downsample = kv_downsample
        self.attention = CameraAttention(channels, len(cameras), heads=heads, backend=backend)
        topology = Topology.named(topology, cameras) if isinstance(topology, str) else topology
        self._table = topology.table(cameras)

    def forward(self, features: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """features (B, V, C, H, W), missing (B, V) bool → (Nq, C, H, W), rows in the order of `missing.nonzero()`."""
        cameras = features.shape[1]
        sample, camera = missing.nonzero().unbind(1)
        listed = self._table.to(missing.device)[camera]  # (Nq, K)
        present = (listed >= 0) & ~missing[sample[:, None], listed.clamp(min=0)]
        block_table = torch.where(present, sample[:, None] * cameras + listed, -1)
        keys = F.avg_pool2d(features.flatten(0, 1), self.kv_downsample, ceil_mode=True, count_include_pad=False)
        key_camera = torch.arange(cameras, device=features.device).repeat(features.shape[0])
        return self.attention(features[sample, camera], camera, keys, key_camera, block_table)


class ScaleCompletion(nn.Module):
    """One scale: attention, a coarse network everywhere, a fine one on the trajectory, a gate."""

    def __init__(self, channels: int, stride: int, sigma: float, **attention):
        super().__init__()
        self.stride, self.sigma, self.backend = stride, sigma, attention.get("backend")
        self.attention = CrossCameraAttention(channels, **attention)
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

    def forward(self, features, missing, trajectory, frame):
        index = missing.nonzero().unbind(1)
        importance = self._importance(features, trajectory, frame)
        completed = replace_maps(features, index, lambda maps: self._complete(maps, features, missing, importance))
        return completed, importance

    def _importance(self, features, trajectory, frame):
        """(B, V, H, W), or None without a trajectory."""
        if trajectory is None:
            return None
        points, valid = (
            t.flatten(0, 1).to(features.device) for t in project_trajectory(trajectory, frame, self.stride)
        )
        size = features.shape[-2:]
        importance = trajectory_importance(points, valid, size, sigma=self.sigma, backend=self.backend)
        return importance.unflatten(0, features.shape[:2])

    def _complete(self, original, features, missing, importance):
        """The maps (Nq, C, H, W) of the missing cameras, completed."""
        borrowed = original + self.attention(features, missing)
        coarse = borrowed + self.coarse(borrowed)
        fine = None if importance is None else borrowed + self.fine(borrowed)
        on_missing = None if importance is None else importance[missing][:, None]
        gate_logits = self.gate(torch.cat([original, coarse], dim=1))
        return gated_fusion(original, coarse, gate_logits, fine=fine, importance=on_missing, backend=self.backend)


class PlanningGuidedCompletion(nn.Module):
    """Completes every scale of missing cameras from present ones (design documents' `PlanningGuidedCompletion`).

    With a trajectory (training) cells near it take the fine network's proposal; without one (inference) only the coarse
    path runs. Present cameras return bit for bit.

    Args:
        strides: of the scales.
        channels: C of every scale.
        sigma: width of the trajectory's importance, image pixels.
        attention: settings of `CrossCameraAttention`.
    """

    def __init__(self, strides: tuple[int, ...], channels: int = 256, *, sigma: float = 64.0, **attention):
        super().__init__()
        self.scales = nn.ModuleList(
            ScaleCompletion(channels, stride, sigma / stride, **attention) for stride in strides
        )

    def forward(
        self,
        features: list[torch.Tensor],
        missing: torch.Tensor,
        frame: RigFrame,
        trajectory: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """features: for each scale (B, V, C, H, W); missing: (B, V) bool; trajectory: (B, T, 2) metres, ego frame.

        Returns the features, and the importance maps (B, V, H, W) of each scale or None without a trajectory.
        """
        if not missing.any():
            return features, None
        with annotate("planning_guided_completion"):
            pairs = [scale(x, missing, trajectory, frame) for scale, x in zip(self.scales, features)]
        completed, importance = (list(column) for column in zip(*pairs))
        return completed, importance if trajectory is not None else None
