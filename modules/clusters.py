"""Centres of many samples."""

import numpy as np
import torch

from ..kernels.runtime.extras import optional

cluster = optional("modules", "scipy.cluster.vq")


def kmeans(samples: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Centres (count, D) of the samples (M, D), by k-means++ and Lloyd's iterations; the same on every run.

    Raises:
        ValueError: fewer different samples than centres.
    """
    different = torch.unique(samples, dim=0)
    if len(different) < count:
        raise ValueError(f"kmeans: samples has {len(different)} different rows, needs at least {count}")
    centres, _ = cluster.kmeans2(
        samples.double().numpy(), count, minit="++", seed=np.random.default_rng(seed), missing="raise"
    )
    return torch.from_numpy(centres).float()
