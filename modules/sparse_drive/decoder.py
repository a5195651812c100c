"""The decoder of instances: boxes and map lines go through the same layers, with a codec each."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from ..settings import Count, Metres, Share
from . import boxes, lines
from .bank import BankState, InstanceBank, Link
from .deformable import DeformableBlock, DeformableConfig, Views
from .layers import Attention, FeedForward, InstanceMixing


@dataclass
class InstanceConfig:
    """What a decoder of boxes and one of lines both have."""

    anchors: Count = 900
    kept: Count = 600  # handed on to the next moment
    layers: Count = 6
    single_frame_layers: Count = 1  # before the instances of the moment before join
    decoupled: bool = True  # attention sees features and embeddings side by side, not added
    first_attention: bool = False  # the first layer begins with attention among the anchors
    learned_features: bool = False  # instances begin with features of their own, not with zeros
    decay: Share = 0.6  # of the confidence from moment to moment
    feedforward: Count = 4  # width of the feed-forward networks, in channels
    dropout: Share = 0.1
    # A sample without a past: "ignored" = its instances attend to themselves, as in a drive's first moment; "attended",
    # as upstream = to what the state holds, though it is of another drive.
    stale_history: Literal["ignored", "attended"] = "ignored"
    track_ids: Literal["sample", "batch"] = "sample"  # see `InstanceBank`
    deformable: DeformableConfig = field(default_factory=DeformableConfig)


@dataclass
class BoxConfig(InstanceConfig):
    learned_keypoints: Count = 6  # beside the seven fixed ones

    @property
    def numbers(self) -> int:
        return boxes.NUMBERS

    def build(self, channels: int, heads: int, levels: int, classes: int) -> "InstanceDecoder":
        keypoints = lambda: boxes.BoxKeypoints(channels, self.learned_keypoints)  # noqa: E731
        refinement = lambda: boxes.BoxRefinement(channels, classes)  # noqa: E731
        encoder = boxes.BoxEncoder(channels)
        return InstanceDecoder(self, channels, heads, levels, encoder, keypoints, refinement, boxes.move)


@dataclass
class LineConfig(InstanceConfig):
    anchors: Count = 100
    kept: Count = 33
    decoupled: bool = False
    first_attention: bool = True
    learned_features: bool = True
    points: Count = 20  # of a line
    heights: tuple[Metres, ...] = (0.0, 0.5, -0.5, 1.0, -1.0)  # metres about the ground, at which a point is looked at
    learned_keypoints: Count = 3  # for each point and height

    @property
    def numbers(self) -> int:
        return 2 * self.points

    def build(self, channels: int, heads: int, levels: int, classes: int, ground: float) -> "InstanceDecoder":
        """ground: height of the ground, metres, ego frame."""
        keypoints = lambda: lines.LineKeypoints(  # noqa: E731
            channels, self.points, self.heights, self.learned_keypoints, ground
        )
        refinement = lambda: lines.LineRefinement(channels, classes, self.points)  # noqa: E731
        encoder = lines.LineEncoder(channels, self.points)
        return InstanceDecoder(self, channels, heads, levels, encoder, keypoints, refinement, lines.move)


@dataclass(frozen=True, eq=False)
class InstanceOutput:
    """What a decoder says of its N instances."""

    logits: torch.Tensor  # (layers, B, N, classes) float32
    anchors: torch.Tensor  # (layers, B, N, numbers) float32
    quality: torch.Tensor | None  # (layers, B, N, 2) float32, boxes only
    feature: torch.Tensor  # (B, N, C), after the last layer
    embedding: torch.Tensor  # (B, N, C), of the last anchors
    ids: torch.Tensor  # (B, N) int64, of the tracks


class DecoderLayer(nn.Module):
    """Attention over time, attention among the instances, a look at the images, a feed-forward network, a refinement.

    Each is a module of its own; `InstanceDecoder` runs them.
    """

    def __init__(self, config, channels, heads, levels, keypoints, refine, *, temporal: bool, attention: bool):
        super().__init__()
        width = 2 * channels if config.decoupled else channels
        self.temporal = Attention(width, heads, config.dropout) if temporal else None
        self.attention = Attention(width, heads, config.dropout) if attention else None
        self.attention_norm = nn.LayerNorm(channels) if attention else None
        self.deformable = DeformableBlock(channels, levels, keypoints, config.deformable)
        self.feedforward = FeedForward(2 * channels, channels, config.feedforward * channels, config.dropout)
        self.norm = nn.LayerNorm(channels)
        self.refine = refine


class InstanceDecoder(nn.Module):
    """Refines anchors layer by layer; from the second on together with the instances of the moment before.

    Sparse4D v3 (Lin et al. 2023) as SparseDrive (Sun et al. 2024) uses it for boxes and for map lines.

    Args:
        config: see `InstanceConfig`.
        channels: C.
        heads: of attention.
        levels: number of scales of the maps.
        encoder: anchors to embeddings.
        keypoints, refinement: make the module of one layer.
        move: anchors of another moment to the present, see `boxes.move`.
    """

    def __init__(self, config: InstanceConfig, channels, heads, levels, encoder, keypoints, refinement, move):
        super().__init__()
        if not 1 <= config.single_frame_layers <= config.layers:
            needed = f"1 to {config.layers} of {config.layers} layers"
            raise ValueError(f"single_frame_layers is {config.single_frame_layers}, needs {needed}")
        self.config, self._move = config, move
        settings = dict(kept=config.kept, decay=config.decay, track_ids=config.track_ids)
        self.bank = InstanceBank(
            config.anchors, config.numbers, channels, learned_features=config.learned_features, **settings
        )
        self.encoder = encoder
        self.mixing = InstanceMixing(channels, config.decoupled)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, channels, heads, levels, keypoints(), refinement(),
                temporal=index >= config.single_frame_layers,
                attention=index > 0 or config.first_attention,
            )
            for index in range(config.layers)
        )  # fmt: skip

    def forward(
        self, views: Views, link: Link | None, state: BankState | None, interval: torch.Tensor
    ) -> tuple[InstanceOutput, BankState]:
        """The present moment.

        Args:
            views: what the cameras see.
            link, state: how the moment follows the one before, and what that handed on; None = nothing did.
            interval: (B,) seconds to the moment before, or the standard interval without one.
        """
        batch = len(views.projection)
        feature, anchor = self.bank.begin(batch)
        embedding = self.encoder(anchor)
        past, past_embedding = None, None
        if state is not None:
            elapsed = link.elapsed if self.config.stale_history == "attended" else link.interval
            past = replace(state, anchor=self._move(state.anchor, link.now_T_then, elapsed))
            past_embedding = self.encoder(past.anchor)
        refined = []
        for index, layer in enumerate(self.layers):
            if layer.temporal is not None:
                feature = self._over_time(layer.temporal, feature, embedding, link, past, past_embedding)
            if layer.attention is not None:
                feature = layer.attention_norm(self.mixing(layer.attention, feature, embedding))
            feature = layer.deformable(feature, anchor, embedding, views)
            feature = layer.norm(layer.feedforward(feature))
            refined.append(layer.refine(feature, anchor, embedding, interval))
            anchor = refined[-1].anchor
            if index + 1 == self.config.single_frame_layers and past is not None and link.any:
                feature, anchor = self.bank.merge(past, link.continues, feature, anchor, refined[-1].logits)
            embedding = self.encoder(anchor)
            if index + 1 > self.config.single_frame_layers and past is not None:
                # The first instances are those of the moment before, and by now better placed than they were.
                past_embedding = embedding[:, : self.bank.kept]
        return self._finish(refined, feature, embedding, link, past)

    def _over_time(self, layer, feature, embedding, link, past, past_embedding):
        attended = self.config.stale_history == "attended"
        if past is None or not (link.any or attended):
            return self.mixing.alone(layer, feature, embedding)
        found = self.mixing(layer, feature, embedding, past.feature.to(feature.dtype), past_embedding)
        if link.all or attended:
            return found
        alone = self.mixing.alone(layer, feature, embedding)
        return torch.where(link.continues[:, None, None], found, alone)

    def _finish(self, refined, feature, embedding, link, past):
        logits = torch.stack([layer.logits for layer in refined])
        anchors = torch.stack([layer.anchor for layer in refined])
        quality = None if refined[0].quality is None else torch.stack([layer.quality for layer in refined])
        continues = None if link is None else link.continues
        state, ids = self.bank.hand_on(past, continues, feature, anchors[-1], logits[-1])
        return InstanceOutput(logits, anchors, quality, feature, embedding, ids), state
