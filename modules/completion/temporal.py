"""Stage 1: what a missing camera would see, from what the rig saw a moment ago.

Design documents' `MotionCompensatedTemporalCompletion` (V1, every camera attended to) and `…V2` (the camera itself and
its neighbours). They are one network: weights are interchangeable, only the topology differs.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import gated_fusion, multi_depth_warp
from ...kernels.runtime.nvtx import annotate
from ..attention import CameraAttention
from ..history import HistoryFrame, HistoryQueue
from ..maps import replace_maps, wanted_maps
from ..rig import NUSCENES_CAMERAS, RigFrame, relative_projection
from ..topology import Topology
from .stage import TemporalConfig, TemporalStage, make_decoder


@dataclass(frozen=True)
class AttentionPlan:
    """Says who is completed and from what. Index tensors on the CPU; map index = sample · V + camera."""

    queries: torch.Tensor  # (Nq, 2) sample and camera of each missing map that some key can help
    maps: list[torch.Tensor]  # for each history frame, the (Nt,) maps that are warped, ascending
    block_table: torch.Tensor  # (Nq, M) into the concatenation of `maps`, −1 = none

    @property
    def targets(self) -> torch.Tensor:
        """The maps that something is warped to, ascending."""
        return torch.cat(self.maps).unique()

    def own_past(self, cameras: int) -> "_OwnPast":
        """What collects each missing camera's newest map of the warped ones."""
        return _OwnPast(self.queries, cameras)


@dataclass(frozen=True)
class FullPlan(AttentionPlan):
    """The plan in which every map is completed from every history frame, its shapes known from those of the batch."""

    own: torch.Tensor  # (T, B·V) bool, each map's newest moment among those that help

    @property
    def targets(self) -> torch.Tensor:
        return self.maps[0]

    def own_past(self, cameras: int) -> "_OwnPastOfAll":
        return _OwnPastOfAll(list(self.own))


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


def plan_all(missing: torch.Tensor, frames: list[HistoryFrame], table: torch.Tensor, helpful: torch.Tensor) -> FullPlan:
    """The plan of `plan_attention` with a query for each map, the present ones too; `helpful` (B, V) are the cameras
    that a missing one attends to. Needs a history frame."""
    sample, camera = wanted_maps(missing, every=True)
    every, wanted, blocks, own = sample * missing.shape[1] + camera, table[camera], [], []
    found = torch.zeros_like(missing)
    for step, frame in enumerate(frames):
        listed = (wanted >= 0) & frame.available[sample[:, None], wanted.clamp(min=0)]
        index = sample[:, None] * missing.shape[1] + wanted
        blocks.append(torch.where(listed, step * missing.numel() + index, -1))
        own.append(frame.available & helpful & ~found)
        found = found | own[-1]
    queries = torch.stack([sample, camera], dim=1)
    return FullPlan(queries, [every] * len(frames), torch.cat(blocks, dim=1), torch.stack(own).flatten(1))


class MotionCompensatedTemporalCompletion(TemporalStage):
    """Completes the features of missing cameras from motion-compensated history (V1).

    Every listed camera's past is warped to where that camera looks now, at several depths. How much each depth counts,
    and by how far the place is moved, is said by the cell that is filled: by what the camera shows there now (nothing
    where it is missing) and by which camera and where it is.

    Call it once per moment, in temporal order: it keeps the last `queue_length` moments of every sample (detached from
    autograd) and forgets a sample's history at a scene change, after a gap of more than `max_gap` seconds, or when time
    runs backwards. Or `complete` a moment from a history of your own. Present cameras, and missing ones without any
    history, come back bit for bit.

    Args:
        channels: C of the feature maps.
        config: see `TemporalConfig`; None = its defaults.
        cameras: names of the V cameras in the order of the feature maps.
        topology: which cameras a missing one attends to, for other rigs than those that `config.topology` can name.
        backend: of the operations, see `rigfuse.kernels`; may be set later too.
    """

    def __init__(
        self,
        channels: int,
        config: TemporalConfig | None = None,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        topology: Topology | None = None,
        backend: str | None = None,
    ):
        config = config or TemporalConfig()
        super().__init__(channels, config, cameras=cameras, topology=topology)
        if config.kv_downsample < 1:
            raise ValueError(f"kv_downsample is {config.kv_downsample}, needs at least 1")
        self.kv_downsample, self.max_offset, self.motion = config.kv_downsample, config.max_offset, config.motion
        self.register_buffer("depths", torch.tensor(config.depths, dtype=torch.float32), persistent=False)

        self.attention = CameraAttention(channels, len(self.cameras), heads=config.heads)
        self.offset = nn.Conv2d(channels, 2, 3, padding=1)
        self.depth = nn.Conv2d(channels, len(config.depths), 3, padding=1)
        self.decoder = make_decoder(channels)
        self.gate = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 4, 1), nn.GELU(), nn.Conv2d(channels // 4, 1, 3, padding=1)
        )
        # Training starts from the rigid warp of the camera's own past, and an open gate.
        for layer in (self.offset, self.depth, self.attention.out, self.decoder[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.gate[-1].bias, 3.0)
        self.backend = backend

    def complete(
        self,
        features: torch.Tensor,
        missing: torch.Tensor,
        frame: RigFrame,
        history: HistoryQueue,
        *,
        every: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completes the missing cameras from a history, which forgets what cannot be the past of `frame`.

        With `every` all maps are worked on and those of the missing cameras kept, so that no shape hangs on a value;
        the history must be that of `frame` already.

        Returns the features as `forward` does, and which cameras were completed, (B, V) bool: the missing ones that
        some history could help.
        """
        helped = torch.zeros_like(missing)
        if not self.enable:
            return features, helped
        self._validate(features, missing, frame)
        with annotate("temporal_completion"):
            if every:
                return self._complete_all(features, missing, frame, history.frames)
            history.prepare(frame, features)
            past = history.frames
            plan = plan_attention(missing, past, self._table)
            completed = features
            if len(plan.queries):
                index = plan.queries.to(features.device).unbind(1)
                steered = self._steer(features, plan)
                run = lambda maps: self._complete(maps, index[1], frame, past, plan, steered)  # noqa: E731
                completed = replace_maps(features, index, run)
                helped[index] = True
        return completed, helped

    def _complete_all(self, features, missing, frame, past):
        """`complete` with a query for each map."""
        plan = plan_all(missing.cpu(), past, self._table, self.helpful(missing.cpu()))
        helped = missing & (plan.block_table >= 0).any(dim=1).view_as(missing).to(missing.device)
        index, steered = plan.queries.to(features.device).unbind(1), self._steer(features, plan)
        run = lambda maps: self._complete(maps, index[1], frame, past, plan, steered)  # noqa: E731
        return replace_maps(features, index, run, only=helped), helped

    def _steer(self, features, plan):
        """What the target cells say of the warp: depth weights (Nu, D, H, W) and offsets (Nu, 1, H, W, 2) in cells, of
        the maps `plan.targets`. Features pass no gradient through this."""
        targets = plan.targets.to(features.device)
        now = torch.zeros(len(targets), device=features.device)
        where = self.attention.encoding(targets % len(self.cameras), now, features.shape[-2:])
        maps = features.detach().flatten(0, 1)[targets] + where.mT.unflatten(-1, features.shape[-2:])
        offsets = self.max_offset * torch.tanh(self.offset(maps).float())  # (Nu, 2, H, W), (x, y)
        return self.depth(maps).float().softmax(dim=1), offsets.movedim(1, -1)[:, None]

    def _complete(self, original, camera, frame, past, plan, steered):
        """original (Nq, C, H, W), the maps of the missing cameras (Nq,) → the same, completed."""
        with annotate("temporal_completion.warp"):
            keys = self._warped_keys(frame, past, plan, steered)
        with annotate("temporal_completion.attend"):
            attended = keys.own_past + self.attention(
                original + keys.own_past,
                camera,
                keys.maps,
                keys.camera,
                plan.block_table.to(original.device),
                key_age=keys.age,
                key_mask=keys.covered,
            )
        with annotate("temporal_completion.fuse"):
            completed = attended + self.decoder(attended)
            gate_logits = self.gate(torch.cat([original, completed], dim=1))
            return gated_fusion(original, completed, gate_logits, backend=self.backend)

    def _warped_keys(self, frame, past, plan, steered):
        """Warps what the plan lists, each history frame in one call, the newest first."""
        maps, camera, age, covered, own_past = [], [], [], [], plan.own_past(len(self.cameras))
        for then, listed in zip(past, plan.maps):
            row = torch.searchsorted(plan.targets, listed).to(self.depths.device)
            warped, coverage = self._warp(then, listed, frame, *(values[row] for values in steered))
            maps.append(self._pool(warped))
            covered.append(self._pool(coverage[:, None]).flatten(1) > 0)
            camera.append(listed % len(self.cameras))
            age.append((frame.timestamp - then.frame.timestamp)[listed // len(self.cameras)])
            own_past.take(warped, coverage, listed)
        maps = torch.cat(maps)
        camera, age = (torch.cat(parts).to(maps.device) for parts in (camera, age))
        return _WarpedKeys(maps, camera, age, torch.cat(covered), own_past.maps)

    def _warp(self, past, listed, frame, weights, offsets):
        """The listed maps (Nt,) of a history frame as their cameras would see them now: (Nt, C, H, W) and coverage."""
        sample, camera = listed // len(self.cameras), listed % len(self.cameras)
        past_T_now = torch.linalg.solve(past.frame.world_T_ego[sample], frame.world_T_ego[sample])
        projection = relative_projection(
            frame.image_T_ego[sample, camera],
            past.frame.image_T_ego[sample, camera],
            past_T_now,
            stride=self.stride,
        )
        if not self.motion:
            projection = torch.eye(3, 4).expand_as(projection)
        features = past.maps(listed)
        return multi_depth_warp(
            features,
            projection.to(features.device),
            self.depths,
            weights=weights,
            offsets=offsets,
            backend=self.backend,
        )

    def _pool(self, maps):
        return F.avg_pool2d(maps, self.kv_downsample, ceil_mode=True, count_include_pad=False)


@dataclass(frozen=True, eq=False)
class _WarpedKeys:
    """What the missing cameras attend to: S maps, those of all history frames one after another."""

    maps: torch.Tensor  # (S, C, h, w), pooled
    camera: torch.Tensor  # (S,) int
    age: torch.Tensor  # (S,) seconds
    covered: torch.Tensor  # (S, h·w) bool, where the warp found anything
    own_past: torch.Tensor  # (Nq, C, H, W), what each missing camera saw last, warped; zeros where that is nothing


class _OwnPast:
    """Collects each missing camera's newest map from warped history frames that come newest first.

    Args:
        queries: (Nq, 2) sample and camera of each missing map.
        cameras: V.
    """

    def __init__(self, queries: torch.Tensor, cameras: int):
        self._wanted = queries[:, 0] * cameras + queries[:, 1]
        self._found = torch.zeros(len(queries), dtype=torch.bool)
        self.maps = None

    def take(self, warped: torch.Tensor, coverage: torch.Tensor, listed: torch.Tensor) -> None:
        """Takes the maps of cameras of which no newer one came before: warped (Nt, C, H, W) and coverage (Nt, H, W) of
        the maps `listed` (Nt,), ascending."""
        if self.maps is None:
            dtype = torch.promote_types(warped.dtype, coverage.dtype)
            self.maps = warped.new_zeros(len(self._wanted), *warped.shape[1:], dtype=dtype)
        row = torch.searchsorted(listed, self._wanted).clamp(max=max(len(listed) - 1, 0))
        fresh = ~self._found & torch.isin(self._wanted, listed)
        if fresh.any():
            query, row = fresh.nonzero()[:, 0].to(warped.device), row[fresh].to(warped.device)
            newest = warped[row] / coverage[row, None].clamp(min=1e-3)
            self.maps = self.maps.index_put((query,), newest)
        self._found |= fresh


class _OwnPastOfAll:
    """The same of a `FullPlan`, whose `own` say for each history frame whose newest map it is, (B·V,) bool each."""

    def __init__(self, own: list[torch.Tensor]):
        self._own, self.maps = own[::-1], 0.0

    def take(self, warped: torch.Tensor, coverage: torch.Tensor, listed: torch.Tensor) -> None:
        fresh = self._own.pop().to(warped.device)[:, None, None, None]
        self.maps = torch.where(fresh, warped / coverage[:, None].clamp(min=1e-3), self.maps)


class MotionCompensatedTemporalCompletionV2(MotionCompensatedTemporalCompletion):
    """V2: a missing camera attends to its own past and its two neighbours'. Half the keys, half the warps.

    The same network as V1, with `config.topology` "neighbours" whatever it says.
    """

    def __init__(self, channels: int, config: TemporalConfig | None = None, **settings):
        super().__init__(channels, replace(config or TemporalConfig(), topology="neighbours"), **settings)
