"""Released weights of CMT (voxel0100_r50_800x320), by the names of this toolkit."""

from collections import Counter

import torch

from ....modules.cmt_aqr.upstream_names import convert
from .configs import cmt_upstream

FOR = "for the experiments with `upstream` in their names: LiDAR frame, x right and y ahead, and RGB images"


def import_whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of `cmt_upstream()`'s network from those of upstream.

    Args:
        state: tensors by upstream's names.

    Raises:
        ValueError: a name finds no place, a weight stays unfilled, or a shape is another; all are listed.
    """
    experiment = cmt_upstream()
    with torch.device("meta"):
        own = experiment.build_model().state_dict()
    found = convert(state, own, experiment.model.decoder.layers)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def report(weights: dict[str, torch.Tensor]) -> list[str]:
    """What was filled, in lines."""
    counts, sizes = Counter(), Counter()
    for name, tensor in weights.items():
        counts[name.split(".")[0]] += 1
        sizes[name.split(".")[0]] += tensor.numel()
    return [f"{part}: all {count} tensors filled, {sizes[part]:,} numbers" for part, count in counts.items()] + [FOR]
