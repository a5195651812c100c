"""Several completions side by side, and what joins them."""

import torch
from torch import nn


class ConfidenceFusion(nn.Module):
    """Joins completions of the same maps by the confidence that each cell has in each of them.

    Confidence is predicted from a completion's features and from which completion it is; it begins equal.

    Args:
        channels: C of the maps.
        branches: how many completions there are.
    """

    def __init__(self, channels: int, branches: int):
        super().__init__()
        hidden = max(channels // 4, 1)
        self.confidence = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, 1, 3, padding=1))
            for _ in range(branches)
        )
        for branch in self.confidence:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)

    def forward(self, completions: list[torch.Tensor]) -> torch.Tensor:
        """Joins one map (N, C, H, W) for each branch into (N, C, H, W)."""
        scores = [branch(x) for branch, x in zip(self.confidence, completions, strict=True)]
        share = torch.stack(scores).float().softmax(dim=0).to(completions[0].dtype)  # (branches, N, 1, H, W)
        return (share * torch.stack(completions)).sum(dim=0)
