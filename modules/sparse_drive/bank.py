"""The instances that a decoder begins with, and those that it hands on from moment to moment."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..rig import RigFrame
from .layers import best, take


@dataclass(frozen=True, eq=False)
class BankState:
    """The K best instances of a moment, the best first, without gradient."""

    feature: torch.Tensor  # (B, K, C)
    anchor: torch.Tensor  # (B, K, numbers) float32, in the ego frame of that moment
    confidence: torch.Tensor  # (B, K) in [0, 1]
    ids: torch.Tensor  # (B, K) int64, of the tracks
    next_id: torch.Tensor  # (B,) int64, the first id that nobody has had


@dataclass(frozen=True, eq=False)
class Link:
    """How a moment follows the one before."""

    continues: torch.Tensor  # (B,) bool: the same drive, a little later
    interval: torch.Tensor  # (B,) float32 seconds; the standard interval where it does not continue
    elapsed: torch.Tensor  # (B,) float32 seconds, whatever they are
    now_T_then: torch.Tensor  # (B, 4, 4) float32, ego points of that moment to the present ego frame
    any: bool  # some sample continues …
    all: bool  # … every sample does

    @staticmethod
    def between(then: RigFrame, now: RigFrame, *, max_gap: float, standard: float, device: torch.device) -> "Link":
        """A sample continues where the scene is the same and 0 < time that passed ≤ `max_gap` seconds."""
        if then.batch_size != now.batch_size:
            raise ValueError(f"state is of {then.batch_size} samples, frame of {now.batch_size}; needs the same number")
        elapsed = (now.timestamp - then.timestamp).cpu()
        same = torch.tensor([a == b for a, b in zip(then.scene, now.scene)], dtype=torch.bool)
        continues = same & (elapsed > 0) & (elapsed <= max_gap)
        now_T_then = torch.linalg.solve(now.world_T_ego, then.world_T_ego)
        interval = torch.where(continues, elapsed, standard)
        tensors = (continues, interval.float(), elapsed.float(), now_T_then.float())
        return Link(*(t.to(device) for t in tensors), any=bool(continues.any()), all=bool(continues.all()))


class InstanceBank(nn.Module):
    """Learned anchors, and the rules by which instances live on.

    Args:
        anchors: how many.
        numbers: of an anchor.
        channels: C of the instances' features.
        kept: K, handed on to the next moment.
        decay: of an instance's confidence from moment to moment: what is hidden for a while is not forgotten at once.
        learned_features: the instances begin with features of their own; otherwise with zeros.
        track_ids: "sample": each sample counts its tracks, whoever else is in the batch; "batch", as upstream: one
            count for all.
    """

    def __init__(
        self,
        anchors: int,
        numbers: int,
        channels: int,
        *,
        kept: int,
        decay: float = 0.6,
        learned_features: bool = False,
        track_ids: Literal["sample", "batch"] = "sample",
    ):
        super().__init__()
        if not 0 < kept < anchors:
            raise ValueError(f"InstanceBank: kept is {kept}, needs 1 to {anchors - 1} of {anchors} anchors")
        self.kept, self.decay, self.track_ids = kept, decay, track_ids
        self.anchor = nn.Parameter(torch.zeros(anchors, numbers))
        feature = torch.zeros(anchors, channels)
        if learned_features:
            self.feature = nn.Parameter(nn.init.xavier_uniform_(feature))
        else:
            self.register_buffer("feature", feature)

    def begin(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, N, C) and anchors (B, N, numbers) of a moment's first layer."""
        return self.feature.expand(batch, -1, -1), self.anchor.expand(batch, -1, -1)

    def merge(
        self,
        state: BankState,
        continues: torch.Tensor,
        feature: torch.Tensor,
        anchor: torch.Tensor,
        logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a sample continues: the instances of the moment before, then the best of the present's, N in all.

        `state.anchor` must have been moved to the present. feature (B, N, C), anchor (B, N, numbers), logits (B, N,
        classes) are what the single-frame layers say.
        """
        places = best(logits.amax(-1), self.anchor.shape[0] - self.kept)
        features = torch.cat([state.feature.to(feature.dtype), take(feature, places)], dim=1)
        anchors = torch.cat([state.anchor, take(anchor, places)], dim=1)
        where = continues[:, None, None]
        return torch.where(where, features, feature), torch.where(where, anchors, anchor)

    @torch.no_grad()
    def hand_on(
        self,
        state: BankState | None,
        continues: torch.Tensor,
        feature: torch.Tensor,
        anchor: torch.Tensor,
        logits: torch.Tensor,
    ) -> tuple[BankState, torch.Tensor]:
        """The state for the next moment, and the ids (B, N) of all instances.

        An instance that was handed on keeps its id and, where it is now less sure, its decayed confidence: that is the
        tracking, nothing else associates.
        """
        confidence = logits.detach().amax(-1).sigmoid()
        ids = torch.full(confidence.shape, -1, dtype=torch.int64, device=confidence.device)
        next_id = torch.zeros_like(ids[:, 0])
        if state is not None:
            old = torch.where(continues[:, None], state.confidence * self.decay, 0)
            confidence = torch.cat([confidence[:, : self.kept].maximum(old), confidence[:, self.kept :]], dim=1)
            ids[:, : self.kept] = torch.where(continues[:, None], state.ids, -1)
            next_id = state.next_id
        ids, next_id = self._number(ids, next_id)
        places = best(confidence, self.kept)
        kept = (take(t.detach(), places) for t in (feature, anchor, confidence, ids))
        return BankState(*kept, next_id), ids

    def _number(self, ids, next_id):
        """Ids for those that have none, in their order."""
        new = ids < 0
        if self.track_ids == "sample":
            numbers, count = new.cumsum(1) - 1, new.sum(1)
        else:
            numbers, count = (new.flatten().cumsum(0) - 1).view(new.shape), new.sum()
        return torch.where(new, next_id[:, None] + numbers, ids), next_id + count
