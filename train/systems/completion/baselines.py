"""What completion is compared with: fillings that learn nothing but a mean."""

from collections.abc import Iterable, Sequence

import torch

from ....modules.completion.cascade import CompletionCascade
from ....modules.completion.motion import moved_to_now
from ....modules.rig import RigFrame
from ...distributed import sum_over_ranks


@torch.no_grad()
def training_mean(model: CompletionCascade, images: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The constant: the mean of each camera's features, cell by cell, over moments that were trained on.

    It sees nothing of the moment that it fills, so whatever is worse has learnt nothing of it.

    Args:
        model: put into evaluation.
        images: batches (B, V, 3, H, W), normalised, on the model's device: this rank's share.

    Returns:
        for each scale (V, C, h, w) float32, the mean over all ranks.
    """
    model.eval()
    sums, count = None, 0
    for batch in images:
        maps = [x.float().sum(0) for x in model.extract(batch)]
        sums = maps if sums is None else [a + b for a, b in zip(sums, maps)]
        count += len(batch)
    if sums is None:
        raise ValueError("training_mean: there are no images")
    total = sum_over_ranks(sums[0].new_tensor([count], dtype=torch.float64)).item()
    return [sum_over_ranks(x) / total for x in sums]


def random_features(model: CompletionCascade) -> list[str]:
    """A line that says so where the features are those of random weights; none where they are of trained ones."""
    parts = getattr(model.backbone, "random_parts", list)()
    if not parts:
        return []
    how = "give it trained ones with model.backbone.weights"
    return [f"WARNING: RANDOM FEATURES: the weights of the {' and the '.join(parts)} are random and frozen; {how}"]


def warp_rig(
    features: torch.Tensor, then: RigFrame, now: RigFrame, stride: int, depths: Sequence[float]
) -> torch.Tensor:
    """Moves every camera's earlier features (B, V, C, H, W) to the present: the mean over the depths that see any."""
    return moved_to_now(features, then, now, stride, depths)[0]
