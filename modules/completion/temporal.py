"""Stage 1: what a missing camera would see, from what the rig saw a moment ago.

Design documents' `MotionCompensatedTemporalCompletion` (V1, every camera attended to) and `…V2` (the camera itself and
its neighbours). They are one network: weights are interchangeable, only the topology differs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import cross_camera_attention, gated_fusion, multi_depth_warp
from ...kernels.runtime.nvtx import annotate
from ..attention import CameraAttention
from ..history import HistoryFrame, HistoryQueue
from ..maps import replace_maps
from ..rig import NUSCENES_CAMERAS, RigFrame, relative_projection
from ..topology import Topology


@dataclass(frozen=True)
class AttentionPlan:
    """Who is completed and from what. Index tensors on the CPU; map index = sample · V + camera."""

    queries: torch.Tensor  # (Nq, 2) sample and camera of each missing map that some key can help
    maps: list[torch.Tensor]  # for each history frame, the (Nt,) maps that are warped
    block_table: torch.Tensor  # (Nq, M) into the concatenation of `maps`, −1 = none


def plan_attention(missing: torch.Tensor, frames: list[HistoryFrame], table: torch.Tensor) -> AttentionPlan:
    """Lists the camera frames that `table` (V, K; −1 padded) names for the missing cameras, and only those.

    A camera that was itself missing in a history frame, or belongs to another scene, is left out of that frame.
    """
    queries = missing.cpu().nonzero()
    sample, camera = queries.unbind(1)
    wanted = table[camera]  # (Nq, K)
    maps, blocks, start = [], [], 0
    for frame in frames:
        listed = (wanted >= 0) & frame.available[sample[:, None], wanted.clamp(min=0)]
        index = sample[:, None] * missing.shape[1] + wanted
        used = index[listed].unique()
        blocks.append(torch.where(listed, start + torch.searchsorted(used, index), -1))
        maps.append(used)
        start += len(used)
    block_table = torch.cat(blocks, dim=1) if blocks else queries.new_full((len(queries), 0), -1)
    helped = (block_table >= 0).any(dim=1)
    return AttentionPlan(queries[helped], maps, block_table[helped])


class MotionCompensatedTemporalCompletion(nn.Module):
    """Completes the features of missing cameras from motion-compensated history (V1).

    Call it once per moment, in temporal order: it keeps the last `queue_length` moments of every sample (detached from
    autograd) and forgets a sample's history at a scene change, after a gap of more than `max_gap` seconds, or when time
    runs backwards. Present cameras, and missing ones without any history, come back bit for bit.

    Args:
        channels: C of the feature maps.
        cameras: names of the V cameras in the order of the feature maps.
        topology: which cameras a missing one attends to: "global" (V1), "neighbours" (V2), "own", or any `Topology`.
        heads: attention heads.
        depths: hypotheses at which the history is warped, metres; how much each counts is learned for every cell.
        queue_length: moments of history.
        kv_downsample: side of the square of warped cells that is averaged into one key.
        stride: image pixels per feature cell.
        max_offset: bound of the learned refinement of the warp, in cells.
        enable: False returns the input and keeps no history.
        max_gap: seconds between moments after which a history is stale.
        history_dtype: dtype the history is stored in, e.g. torch.bfloat16; None = the features'.
        backend: backend of the operations, see `rigfuse.kernels`.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        topology: str | Topology = "global",
        heads: int = 8,
        depths: tuple[float, ...] = (10.0, 30.0),
        queue_length: int = 4,
        kv_downsample: int = 4,
        stride: int = 32,
        max_offset: float = 2.0,
        enable: bool = True,
        max_gap: float = 2.0,
        history_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if kv_downsample < 1:
            raise ValueError(f"kv_downsample is {kv_downsample}, needs at least 1")
        self.cameras, self.channels = tuple(cameras), channels
        self.kv_downsample, self.stride, self.max_offset = kv_downsample, stride, max_offset
        self.enable, self.backend = enable, backend
        self.topology = Topology.named(topology, self.cameras) if isinstance(topology, str) else topology
        self.history = HistoryQueue(queue_length, dtype=history_dtype, max_gap=max_gap)
        self.register_buffer("depths", torch.tensor(depths, dtype=torch.float32), persistent=False)
        self._table = self.topology.table(self.cameras)

        self.attention = CameraAttention(channels, len(self.cameras), heads=heads, backend=backend)
        self.offset = nn.Conv2d(channels, 2, 3, padding=1)
        self.depth = nn.Conv2d(channels, len(depths), 3, padding=1)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )
        self.gate = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 4, 1), nn.GELU(), nn.Conv2d(channels // 4, 1, 3, padding=1)
        )
        # Training starts from the rigid warp of the camera's own past, and an open gate.
        for layer in (self.offset, self.depth, self.attention.out, self.decoder[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.gate[-1].bias, 3.0)

    def reset_history(self) -> None:
        self.history.clear()

    def forward(self, features: torch.Tensor, missing: torch.Tensor, frame: RigFrame) -> torch.Tensor:
        """Completes the missing cameras of one moment and remembers it.

        Args:
            features: (B, V, C, H, W) at `stride`; gets gradients (its history does not). Maps in channels_last memory
                format are the fast ones.
            missing: (B, V) bool, True = this camera's image is absent.
            frame: the rig at this moment.

        Returns:
            (B, V, C, H, W): `features` with the missing cameras' maps completed.
        """
        return self.complete(features, missing, frame)[0]

    def complete(
        self, features: torch.Tensor, missing: torch.Tensor, frame: RigFrame
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and which cameras were completed, (B, V) bool: the missing ones that some history could help."""
        helped = torch.zeros_like(missing)
        if not self.enable:
            return features, helped
        self._validate(features, missing, frame)
        with annotate("temporal_completion"):
            self.history.prepare(frame, features)
            plan = plan_attention(missing, self.history.frames, self._table)
            completed = features
            if len(plan.queries):
                index = plan.queries.to(features.device).unbind(1)
                completed = replace_maps(features, index, lambda maps: self._complete(maps, index[1], frame, plan))
                helped[index] = True
        self.history.push(features, missing, frame)
        return completed, helped

    def _validate(self, features, missing, frame):
        if features.ndim != 5 or features.shape[1:3] != (len(self.cameras), self.channels):
            needed = f"(B, {len(self.cameras)}, {self.channels}, H, W)"
            raise ValueError(f"features has shape {tuple(features.shape)}, needs {needed}")
        if missing.dtype != torch.bool:
            raise TypeError(f"missing is {str(missing.dtype).removeprefix('torch.')}, needs bool")
        for name, shape in dict(missing=missing.shape, frame=frame.image_T_ego.shape[:2]).items():
            if shape != features.shape[:2]:
                raise ValueError(f"{name} has shape {tuple(shape)}, needs (B, V) = {tuple(features.shape[:2])}")

    def _complete(self, original, camera, frame, plan):
        """The maps (Nq, C, H, W) of the missing cameras (Nq,), completed."""
        with annotate("temporal_completion.warp"):
            keys, key_camera, key_age, key_mask, remembered = self._keys(frame, plan)
        with annotate("temporal_completion.attend"):
            attended = remembered + self.attention(
                original + remembered,
                camera,
                keys,
                key_camera,
                plan.block_table.to(original.device),
                key_age=key_age,
                key_mask=key_mask,
                operation=self._attend,
            )
        with annotate("temporal_completion.fuse"):
            completed = attended + self.decoder(attended)
            gate_logits = self.gate(torch.cat([original, completed], dim=1))
            return self._fuse(original, completed, gate_logits)

    def _keys(self, frame, plan):
        """The pooled maps (S, C, h, w) of every warped camera frame, S = Σ Nt, their camera (S,), their age (S,) in
        seconds, where the warp found anything, (S, h·w) bool, and what the missing cameras last saw (Nq, C, H, W)."""
        keys, cameras, ages, masks, own = [], [], [], [], []
        for past, maps in zip(self.history.frames, plan.maps):
            warped, coverage = self._warp_frame(past, maps, frame)
            keys.append(self._pool(warped))
            masks.append(self._pool(coverage[:, None]).flatten(1) > 0)
            cameras.append(maps % len(self.cameras))
            ages.append((frame.timestamp - past.frame.timestamp)[maps // len(self.cameras)])
            own.append(self._own(warped, coverage, maps, plan.queries))
        keys = torch.cat(keys)
        device = keys.device
        return keys, torch.cat(cameras).to(device), torch.cat(ages).to(device), torch.cat(masks), self._newest(own)

    def _own(self, warped, coverage, maps, queries):
        """Which missing cameras (Nq,) have their own map among `maps`, and these maps where the warp found any."""
        index = queries[:, 0] * len(self.cameras) + queries[:, 1]
        place = torch.searchsorted(maps, index).clamp(max=max(len(maps) - 1, 0))
        there = maps[place] == index if len(maps) else torch.zeros(len(index), dtype=torch.bool)
        rows = place[there].to(warped.device)
        return there, warped[rows] / coverage[rows, None].clamp(min=1e-3)

    def _newest(self, own):
        """Each missing camera's newest map, zeros for one without: (Nq, C, H, W). `own` is newest first."""
        newest = found = None
        for there, maps in own:
            if newest is None:
                newest = maps.new_zeros(len(there), *maps.shape[1:])
                found = torch.zeros_like(there)
            fresh = there & ~found
            if fresh.any():
                newest = newest.index_put((fresh.nonzero()[:, 0].to(maps.device),), maps[fresh[there].to(maps.device)])
            found |= there
        return newest

    def _warp_frame(self, past, maps, frame):
        """The listed maps of a history frame as their cameras would see them now: (Nt, C, H, W) and coverage."""
        sample, camera = maps // len(self.cameras), maps % len(self.cameras)
        past_T_now = torch.linalg.solve(past.frame.world_T_ego[sample], frame.world_T_ego[sample])
        projection = relative_projection(
            frame.image_T_ego[sample, camera],
            past.frame.image_T_ego[sample, camera],
            past_T_now,
            stride=self.stride,
        )
        features = past.features.flatten(0, 1)[maps.to(past.features.device)]
        maps = features.to(self.offset.weight.dtype)
        offsets = self.max_offset * torch.tanh(self.offset(maps).float())  # (Nt, 2, H, W), (x, y)
        weights = self.depth(maps).float().softmax(dim=1)  # (Nt, D, H, W)
        return self._warp(features, projection.to(features.device), offsets.movedim(1, -1)[:, None], weights)

    def _pool(self, maps):
        return F.avg_pool2d(maps, self.kv_downsample, ceil_mode=True, count_include_pad=False)

    # The three places where the work is, overridden by the benchmark's baselines.

    def _warp(self, features, projection, offsets, weights):
        return multi_depth_warp(
            features, projection, self.depths, weights=weights, offsets=offsets, backend=self.backend
        )

    def _attend(self, query, key, value, block_table, key_mask):
        return cross_camera_attention(query, key, value, block_table, key_mask=key_mask, backend=self.backend)

    def _fuse(self, original, completed, gate_logits):
        return gated_fusion(original, completed, gate_logits, backend=self.backend)


class MotionCompensatedTemporalCompletionV2(MotionCompensatedTemporalCompletion):
    """V2: a missing camera attends to its own past and its two neighbours'. Half the keys, half the warps."""

    def __init__(self, channels: int = 256, *, topology: str | Topology = "neighbours", **settings):
        super().__init__(channels, topology=topology, **settings)
