"""Map queries: for each line that may be there an instance and its points; and who sees whom."""

import torch
from torch import nn


class MapQueries(nn.Module):
    """Learned tokens: instance 1, its points, instance 2, its points, …

    Args:
        instances: lines that can be found.
        points: of each.
        width: of a token.
        scale: root mean square of the tokens before training: that of the language model's own embeddings.
        shared: a token is the sum of one of `instances` vectors and, for a point, one of `points` vectors, instead of a
            vector of its own.
    """

    def __init__(self, instances: int, points: int, width: int, scale: float, shared: bool = False):
        super().__init__()
        self.instances, self.points = instances, points
        rows = (instances, points) if shared else (instances * (1 + points),)
        scale = scale / len(rows) ** 0.5
        self.vectors = nn.ParameterList(nn.Parameter(scale * torch.randn(count, width)) for count in rows)

    def forward(self) -> torch.Tensor:
        """(instances · (1 + points), width)."""
        if len(self.vectors) == 1:
            return self.vectors[0] * 1.0
        instance, point = self.vectors
        own = torch.cat([torch.zeros_like(point[:1]), point])
        return (instance[:, None] + own).flatten(0, 1)


def sequence_mask(scene: int, instances: int, points: int, device: torch.device | None = None) -> torch.Tensor:
    """Who sees whom: (T, T) bool, True = the token of the row sees that of the column; T = scene + queries.

    Scene tokens see themselves and those before them. Every query sees the whole scene. An instance sees all instances
    and its own points; a point sees its instance and all points of it.
    """
    queries = torch.arange(instances * (1 + points), device=device)
    instance, leads = queries // (1 + points), queries % (1 + points) == 0
    mask = torch.zeros(scene + len(queries), scene + len(queries), dtype=torch.bool, device=device)
    mask[:scene, :scene] = torch.ones(scene, scene, dtype=torch.bool, device=device).tril()
    mask[scene:, :scene] = True
    mask[scene:, scene:] = (instance[:, None] == instance) | (leads[:, None] & leads)
    return mask
