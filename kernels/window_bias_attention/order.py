"""In what order the kernels take the queries."""

import torch


def query_order(centers: torch.Tensor) -> torch.Tensor:
    """(B, maps, Lq) int64, dense: for each map the queries by their row on it, those that are not on it last.

    The windows of neighbours in this order touch few rows of the map, so few tiles of its keys have to look at them.
    """
    # argsort lays its result as its input lies.
    return torch.argsort(centers[..., 1].transpose(1, 2), dim=2, stable=True).contiguous()
