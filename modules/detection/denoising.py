"""Queries made of noised ground truth, beside those that are matched: the decoder learns from them without matching."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..maps_layout import range_bounds
from .boxes import check_ground_truth

BACKGROUND = -1


@dataclass
class Denoising:
    """Denoising queries and what they are to become. They stand before the matching queries: [P denoising, N matching].

    P = groups · (most boxes of a sample), group by group: query g·S + i is box i, once more with other noise.
    """

    reference: torch.Tensor  # (B, P, 3) float32, in [0, 1] of the range; 0 where not valid
    boxes: torch.Tensor  # (B, P, 9), the boxes without noise; ones where not valid
    labels: torch.Tensor  # (B, P) int64, BACKGROUND where the noise was too much
    valid: torch.Tensor  # (B, P) bool, False = padding: no loss
    mask: torch.Tensor  # (P + N, P + N) bool for the self-attention, row = who attends, True = may attend
    kept: float  # share of the labels that the noise may be expected to leave


def make_denoising(
    boxes: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    queries: int,
    point_range: tuple[float, float, float, float, float, float],
    *,
    groups: int = 10,
    noise_scale: float = 1.0,
    split: float = 0.75,
) -> Denoising:
    """Makes denoising queries (Li et al. 2022; Yan et al. 2023) of a batch's ground truth.

    Each box gives a query in each group. Its reference point is the centre moved by `noise_scale` · noise · size/2
    along the box's own axes, noise uniform in [−1, 1]³; noise longer than `split` makes the label background. A group
    sees itself and the matching queries; the matching queries see one another alone, or they would be told the answer.
    The mask is common to the batch: padding is seen by the queries of its group.

    Args:
        boxes: for each sample (G, 9) floating: x, y, z, length, width, height (metres, ego frame), yaw (rad), vx, vy.
            A box whose centre, size or yaw is not finite, or without volume, counts as padding; velocity may be NaN.
        labels: for each sample (G,) int64.
        queries: N, the number of matching queries.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres; reference points are kept inside.
        groups: copies of each box, fewer where P would exceed N; none at all where one sample has more than N boxes.

    The noise comes from torch's global generator of the boxes' device. Nothing gets gradients.

    Raises:
        ValueError, TypeError: wrong shapes or dtypes, `groups` or `queries` below 0, a range without extent.
    """
    check_ground_truth("make_denoising", boxes, labels)
    if groups < 0 or queries < 0:
        raise ValueError(f"make_denoising: groups is {groups} and queries is {queries}, needs 0 or more")
    low, high = range_bounds("make_denoising: point_range", point_range, boxes[0].device)
    most = max(map(len, boxes))
    groups = min(groups, queries // max(most, 1))

    known = pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan).detach().repeat(1, groups, 1)
    label = pad_sequence(list(labels), batch_first=True, padding_value=BACKGROUND).repeat(1, groups)
    valid = known[..., :7].isfinite().all(dim=-1) & (known[..., 3:6] > 0).all(dim=-1)
    noise = torch.rand(known[..., :3].shape, device=known.device) * 2 - 1
    offset = _turn(noise * known[..., 3:6] / 2 * noise_scale, known[..., 6])
    reference = ((known[..., :3] + offset - low) / (high - low)).clamp(0, 1).float()
    return Denoising(
        reference=torch.where(valid[..., None], reference, 0),
        boxes=torch.where(valid[..., None], known, 1),  # ones can be encoded
        labels=torch.where(valid & (noise.norm(dim=-1) <= split), label, BACKGROUND),
        valid=valid,
        mask=_self_attention_mask(known.shape[1], most, queries, known.device),
        kept=kept_share(split),
    )


def kept_share(split: float) -> float:
    """The chance that noise, uniform in [−1, 1]³, is no longer than `split`; above 1 it is taken for certain."""
    return min(math.pi / 6 * split**3, 1.0)


def _turn(offset, yaw):
    """Turns an offset (…, 3) along the box's axes into one along the ego's."""
    (x, y, z), sin, cos = offset.unbind(-1), yaw.sin(), yaw.cos()
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1)


def _self_attention_mask(denoising, group_size, queries, device):
    group = torch.arange(denoising, device=device) // max(group_size, 1)
    group = torch.cat([group, group.new_full((queries,), -1)])  # −1: matching
    return (group[None] == -1) | (group[None] == group[:, None])
