"""Points for the tests of the LiDAR branch, and the grid that they lie in."""

import torch

RANGE, SIZE = (-6.4, -3.2, -3.0, 6.4, 3.2, 5.0), (0.2, 0.2, 0.5)  # x, y, z: 64 × 32 × 16 voxels
GRID = (16, 32, 64)  # z, y, x


def random_points(count=400, samples=2):
    """Clusters inside the range, so that voxels hold several points, and a shell outside it."""
    low, high = torch.tensor(RANGE).view(2, 3)
    places = (torch.rand(count // 4, 3) * 1.2 - 0.1).repeat(4, 1) * (high - low) + low + 0.02 * torch.randn(count, 3)
    return torch.cat([places, torch.randn(count, 2)], 1), torch.randint(samples, (count,))
