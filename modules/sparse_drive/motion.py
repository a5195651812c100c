"""Where the others will be, and where to drive: agents and the ego vehicle as instances that look at one another."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..rig import NUSCENES_CAMERAS, camera_index
from ..settings import Count, Metres, Positive, Share
from . import boxes
from .bank import Link
from .decoder import InstanceOutput
from .deformable import Views
from .layers import PRIOR_BIAS, Attention, FeedForward, InstanceMixing, best, full_precision, mlp, take, widened

COMMANDS = ("right", "left", "straight")
STATUS = 10  # acceleration (3), turn rates (3), velocity (3; the first is the speed ahead), steering angle
_SPEED = 6


@dataclass
class EgoConfig:
    """The vehicle in the frame of boxes and lines. By default the ego frame of this toolkit: x ahead, origin on the
    ground under the rear axle."""

    # x, y, z of the centre, length, width, height (metres), yaw (rad) of the direction ahead
    box: tuple[Metres, Metres, Metres, Positive, Positive, Positive, Metres] = (1.44, 0.0, 0.78, 4.08, 1.73, 1.56, 0.0)
    ground: Metres = 0.0  # height of the ground, metres


@dataclass
class MotionConfig:
    layers: Count = 3
    queue: Count = 4  # moments that an agent remembers, the present one too
    agents: Count = 50  # the surest, which everybody attends to
    lines: Count = 10
    modes: Count = 6  # futures of an agent
    steps: Count = 12  # of half a second, of an agent's future
    plan_modes: Count = 6  # for each command
    plan_steps: Count = 6
    decoupled: bool = True
    feedforward: Count = 2  # width of the feed-forward networks, in channels
    dropout: Share = 0.1
    track_threshold: Share = 0.2  # an agent less sure than this has no past a moment later
    # What the ego vehicle begins with: "all" = the coarsest maps of all cameras that are there; the name of one camera,
    # as upstream does with the front one, which is blind without it.
    ego_view: str = "all"
    ego_speed: Literal["predicted", "measured"] = "predicted"  # the moment before's prediction, or what is passed in


@dataclass(frozen=True, eq=False)
class MotionState:
    """What agents and the ego vehicle remember: the last `queue` moments, the newest last, without gradient."""

    feature: torch.Tensor  # (B, N + 1, queue, C); the ego vehicle is the last
    anchor: torch.Tensor  # (B, N + 1, queue, 11) float32, in the ego frame of the last moment
    period: torch.Tensor  # (B, N + 1) int64, how many of these moments are real
    ids: torch.Tensor  # (B, N) int64
    confidence: torch.Tensor  # (B, N)
    status: torch.Tensor  # (B, 10), predicted


@dataclass(frozen=True, eq=False)
class MotionOutput:
    logits: torch.Tensor  # (B, N, modes) float32
    steps: torch.Tensor  # (B, N, modes, steps, 2) float32 metres, each from the one before, ego frame
    plan_logits: torch.Tensor  # (B, 3, plan_modes) float32, by command
    plan_steps: torch.Tensor  # (B, 3, plan_modes, plan_steps, 2) float32 metres
    status: torch.Tensor  # (B, 10) float32, the ego vehicle's
    past: torch.Tensor  # (B, N + 1, queue, 11), where everybody was, ego frame of now, the newest last
    period: torch.Tensor  # (B, N + 1) int64, how many of these are real


class EgoEncoder(nn.Module):
    """The ego vehicle's feature: two convolutions over coarse maps, then the mean over cells and cameras."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, maps: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """(B, V, C, H, W), visible (B, V) bool or None → (B, C). A camera that is not visible takes no part, in the
        statistics of training neither; without any the feature is zero."""
        batch, cameras = maps.shape[:2]
        if visible is None:
            return self.layers(maps.flatten(0, 1)).mean((2, 3)).unflatten(0, (batch, cameras)).mean(1)
        seen = visible.flatten().nonzero()[:, 0]
        pooled = maps.new_zeros(batch * cameras, maps.shape[2])
        if len(seen):
            found = self.layers(maps.flatten(0, 1)[seen]).mean((2, 3))
            pooled = pooled.to(found.dtype).index_copy(0, seen, found)
        return pooled.unflatten(0, (batch, cameras)).sum(1) / visible.sum(1, keepdim=True).clamp(min=1)


class MotionLayer(nn.Module):
    """Attention to one's own past, to the surest agents, to the surest lines, a feed-forward network."""

    def __init__(self, config: MotionConfig, channels: int, heads: int):
        super().__init__()
        width = 2 * channels if config.decoupled else channels
        self.temporal = Attention(width, heads, config.dropout)
        self.agents = Attention(width, heads, config.dropout)
        self.agents_norm = nn.LayerNorm(channels)
        self.lines = Attention(channels, heads, config.dropout)
        self.lines_norm = nn.LayerNorm(channels)
        self.feedforward = FeedForward(channels, channels, config.feedforward * channels, config.dropout)
        self.norm = nn.LayerNorm(channels)


class MotionRefinement(nn.Module):
    """From the queries of all modes to scores and steps, and from the ego vehicle to its status."""

    def __init__(self, config: MotionConfig, channels: int):
        super().__init__()
        self.logits, self.plan_logits = (_scores(channels) for _ in range(2))
        self.steps, self.plan_steps, self.status = (
            nn.Sequential(
                nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
                nn.Linear(channels, outputs),
            )
            for outputs in (2 * config.steps, 2 * config.plan_steps, STATUS)
        )  # fmt: skip

    def forward(self, agents: torch.Tensor, plans: torch.Tensor, ego: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """agents (B, N, modes, C), plans (B, 1, 3 · plan modes, C), ego (B, 1, C) → logits and steps of agents and of
        plans, and the status: (B, N, modes), (B, N, modes, steps, 2), (B, 1, 3 · plan modes), …, (B, 1, 10)."""
        with full_precision(agents):
            agents, plans, ego = widened(agents, plans, ego)
            steps, plan_steps = (
                f(x).unflatten(-1, (-1, 2)) for f, x in ((self.steps, agents), (self.plan_steps, plans))
            )
            return self.logits(agents)[..., 0], steps, self.plan_logits(plans)[..., 0], plan_steps, self.status(ego)


def _scores(channels):
    layers = mlp(channels, linears=1, norms=2).append(nn.Linear(channels, 1))
    nn.init.constant_(layers[-1].bias, PRIOR_BIAS)
    return layers


class MotionPlanner(nn.Module):
    """Motion of all agents and plans for all commands, at once (SparseDrive: Sun et al. 2024).

    Args:
        config: see `MotionConfig`.
        channels, heads: of everything.
        classes: of agents; each has motion anchors of its own.
        ego: where the vehicle is in the frame.
        cameras: names, in the order of the maps.
    """

    def __init__(
        self,
        config: MotionConfig,
        channels: int,
        heads: int,
        classes: int,
        ego: EgoConfig,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
    ):
        super().__init__()
        self.config, self.yaw = config, ego.box[6]
        self.camera = None if config.ego_view == "all" else camera_index(config.ego_view, cameras)
        self.register_buffer("motion_anchor", torch.zeros(classes, config.modes, config.steps, 2))
        self.register_buffer("plan_anchor", torch.zeros(len(COMMANDS), config.plan_modes, config.plan_steps, 2))
        self.register_buffer("ego_anchor", boxes.encode(torch.tensor([[*ego.box, 0.0, 0.0, 0.0]])))
        self.ego_encoder = EgoEncoder(channels)
        self.motion_encoder = mlp(channels, linears=1, norms=1).append(nn.Linear(channels, channels))
        self.plan_encoder = mlp(channels, linears=1, norms=1).append(nn.Linear(channels, channels))
        self.mixing = InstanceMixing(channels, config.decoupled)
        self.layers = nn.ModuleList(MotionLayer(config, channels, heads) for _ in range(config.layers))
        self.refine = MotionRefinement(config, channels)

    def forward(
        self,
        views: Views,
        detection: InstanceOutput,
        lines: InstanceOutput,
        encoder: nn.Module,
        link: Link | None,
        state: MotionState | None,
        status: torch.Tensor | None = None,
    ) -> tuple[MotionOutput, MotionState]:
        """The present moment. encoder: embeds boxes as for detection; status (B, 10): measured, see `ego_speed`."""
        agents = detection.feature.shape[1]
        confidence = detection.logits[-1].sigmoid().amax(-1)
        ego, ego_anchor = self._ego(views, link, state, status)
        feature = torch.cat([detection.feature, ego.to(detection.feature.dtype)], dim=1)
        embedding = torch.cat([detection.embedding, encoder(ego_anchor)], dim=1)
        anchor = torch.cat([detection.anchors[-1], ego_anchor], dim=1)
        queue = self._remember(feature, anchor, detection.ids, link, state)

        surest = best(confidence, self.config.agents)
        last = surest.new_full((len(surest), 1), agents)
        surest = torch.cat([surest, last], dim=1)  # and the ego vehicle
        near, near_embedding = take(feature, surest), take(embedding, surest)
        surest = best(lines.logits[-1].amax(-1), self.config.lines)
        road, road_embedding = take(lines.feature, surest), take(lines.embedding, surest)
        past_embedding = encoder(queue["anchor"])
        for layer in self.layers:
            feature = self._own_past(layer.temporal, feature, embedding, queue, past_embedding)
            feature = layer.agents_norm(self.mixing(layer.agents, feature, embedding, near, near_embedding))
            positions = dict(query_position=embedding, key_position=road_embedding)
            feature = layer.lines_norm(layer.lines(feature, road, road, **positions))
            feature = layer.norm(layer.feedforward(feature))
        return self._finish(feature, embedding, detection, confidence, queue)

    def _own_past(self, layer, feature, embedding, queue, past_embedding):
        """Everybody attends to the moments that are really its own."""
        flat = (t.flatten(0, 1)[:, None] for t in (feature, embedding))
        past = (t.flatten(0, 1) for t in (queue["feature"].to(feature.dtype), past_embedding))
        age = torch.arange(self.config.queue, 0, -1, device=feature.device)
        hidden = (age > queue["period"][..., None]).flatten(0, 1)
        return self.mixing(layer, *flat, *past, hidden).view_as(feature)

    def _finish(self, feature, embedding, detection, confidence, queue):
        agents = detection.feature.shape[1]
        located = feature + embedding
        classes = detection.logits[-1].argmax(-1)
        ends = turned(self.motion_anchor[classes][..., -1, :], detection.anchors[-1].detach())
        motion = self._mode_queries(self.motion_encoder, ends)  # (B, N, modes, C)
        plan = self._mode_queries(self.plan_encoder, self.plan_anchor[:, :, -1]).flatten(0, 1)
        refined = self.refine(motion + located[:, :agents, None], plan + located[:, agents:, None], located[:, agents:])
        logits, steps, plan_logits, plan_steps, status = refined
        by_command = (len(COMMANDS), self.config.plan_modes)
        plans = (t[:, 0].unflatten(1, by_command) for t in (plan_logits, plan_steps))
        output = MotionOutput(logits, steps, *plans, status[:, 0], queue["anchor"], queue["period"])
        # The ego vehicle remembers what it made of the moment; an agent what detection did.
        newest = queue["feature"].clone()
        newest[:, agents, -1] = feature[:, agents].detach().to(newest.dtype)
        kept = (detection.ids, confidence.detach(), status[:, 0].detach())
        return output, MotionState(newest, queue["anchor"], queue["period"], *kept)

    def _mode_queries(self, encoder, ends):
        with full_precision(ends):
            return encoder(sine_embedding(ends, self.plan_encoder[0].in_features))

    def _ego(self, views, link, state, status):
        """Feature (B, 1, C) and anchor (B, 1, 11) of the ego vehicle now."""
        maps, visible = views.maps[-1], views.visible
        if self.camera is not None:
            maps, visible = maps[:, self.camera, None], None if visible is None else visible[:, self.camera, None]
        feature = self.ego_encoder(maps, visible)[:, None]
        anchor = self.ego_anchor.expand(len(feature), -1, -1)
        if self.config.ego_speed == "measured":
            if status is None:
                raise ValueError("MotionPlanner: ego_speed is 'measured', needs ego_status")
            speed = status[:, _SPEED]
        elif state is not None:
            speed = torch.where(link.continues, state.status[:, _SPEED], 0)
        else:
            return feature, anchor
        ahead = anchor.new_tensor([math.cos(self.yaw), math.sin(self.yaw), 0.0])
        return feature, torch.cat([anchor[..., :8], speed.to(anchor)[:, None, None] * ahead], dim=-1)

    @torch.no_grad()
    def _remember(self, feature, anchor, ids, link, state):
        """The queues with the present at their end: dict of feature, anchor, period as in `MotionState`."""
        length = self.config.queue
        if state is None:
            old_feature = feature.new_zeros(*feature.shape[:2], length - 1, feature.shape[2])
            old_anchor = anchor.new_zeros(*anchor.shape[:2], length - 1, anchor.shape[2])
            period = torch.zeros_like(ids[:, :1]).expand(-1, feature.shape[1])
        else:
            place, known = self._own_place(ids, link, state)
            old_feature = take(state.feature[:, :, 1:], place) * known[..., None, None]
            moved = boxes.move(state.anchor[:, :, 1:].flatten(1, 2), link.now_T_then)
            old_anchor = take(moved.view(*state.anchor.shape[:2], length - 1, -1), place) * known[..., None, None]
            period = take(state.period, place) * known
        return dict(
            feature=torch.cat([old_feature, feature.detach()[:, :, None].to(old_feature.dtype)], dim=2),
            anchor=torch.cat([old_anchor, anchor.detach()[:, :, None]], dim=2),
            period=(period + 1).clamp(max=length),
        )

    def _own_place(self, ids, link, state):
        """Of everybody now: the place (B, N + 1) it had a moment ago, and whether it had one. Where a drive began anew,
        nobody has an id of before."""
        same = (ids[:, :, None] == state.ids[:, None]) & (state.confidence > self.config.track_threshold)[:, None]
        place, known = same.int().argmax(-1), same.any(-1)
        ego = torch.full_like(place[:, :1], ids.shape[1])
        return torch.cat([place, ego], dim=1), torch.cat([known, link.continues[:, None]], dim=1)


def turned(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Offsets (B, N, modes, 2) in the frames of boxes (B, N, 11), x ahead, in the directions of the boxes' frame."""
    yaw = torch.atan2(anchors[..., 6], anchors[..., 7])[..., None]
    x, y = offsets.unbind(-1)
    return torch.stack([x * yaw.cos() - y * yaw.sin(), x * yaw.sin() + y * yaw.cos()], dim=-1)


def sine_embedding(points: torch.Tensor, channels: int) -> torch.Tensor:
    """(…, 2) metres → (…, channels): sines and cosines of y, then of x, interleaved, the wavelengths a geometric ladder
    from 1 to 10,000 metres (DAB-DETR: Liu et al. 2022)."""
    half = channels // 2
    index = torch.arange(half, dtype=points.dtype, device=points.device)
    wavelength = 10000 ** (2 * (index // 2) / half)
    phase = 2 * math.pi * points.flip(-1)[..., None] / wavelength  # (…, 2, half)
    waves = torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1)
    return waves.flatten(-3)
