"""Which of a decoder's instances stands for which truth, and what being matched, or not, costs."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ...kernels.runtime.extras import optional
from .losses import focal_loss

optimize = optional("modules", "scipy.optimize")

_IMPOSSIBLE = 1e8


@dataclass(frozen=True, eq=False)
class Match:
    """Which instances of one sample have which truth, at one layer."""

    instance: torch.Tensor  # (M,) int64, ascending
    truth: torch.Tensor  # (M,) int64
    order: torch.Tensor | None = None  # (M,) int64, of a line's points


def assign(cost: torch.Tensor) -> list[list[torch.Tensor]]:
    """The pairs of least total cost (Carion et al. 2020): (layers, N, G) → for each layer the places (M,) of instances,
    ascending, and of truths. A cost that is not finite is a very high one."""
    device = cost.device
    cost = cost.double().cpu().numpy()
    cost = np.where(np.isfinite(cost), cost, _IMPOSSIBLE)
    return [[torch.from_numpy(places).to(device) for places in optimize.linear_sum_assignment(layer)] for layer in cost]


def class_costs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What matching adds to the focal loss: logits (…, N, classes), labels (G,) → (…, N, G)."""
    logits = logits[..., labels]
    matched, unmatched = (focal_loss(logits, logits.new_full((), value, dtype=torch.bool)) for value in (1, 0))
    return matched - unmatched


def matched_rows(layer: list[Match]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and instances (M,) of the matches of all samples."""
    samples = [torch.full_like(match.instance, sample) for sample, match in enumerate(layer)]
    return torch.cat(samples), torch.cat([match.instance for match in layer])


def classification_loss(logits: torch.Tensor, labels: list[torch.Tensor], layer: list[Match]) -> torch.Tensor:
    """Focal loss, summed over all instances (B, N, classes); unmatched ones are background."""
    target = torch.zeros_like(logits, dtype=torch.bool)
    for sample, (label, match) in enumerate(zip(labels, layer)):
        target[sample, match.instance, label[match.truth]] = True
    return focal_loss(logits, target).sum()


def mean_over_ranks(counts: list[int], device: torch.device) -> torch.Tensor:
    """Counts of matches, averaged over the ranks, at least one each: what losses are divided by."""
    counts = torch.tensor(counts, dtype=torch.float32, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    return counts.clamp(min=1)
