"""Attention from the maps of some cameras to the maps of others."""

from collections.abc import Callable

import torch
from torch import nn

from ..kernels import cross_camera_attention
from .positions import CameraTimeSpaceEncoding


class CameraAttention(nn.Module):
    """Multi-head attention between camera maps; every token says which camera, how long ago and where it is from.

    Args:
        channels: C of queries and keys.
        cameras: number of cameras of the rig.
        heads: attention heads.
        backend: backend of `cross_camera_attention`.
    """

    def __init__(self, channels: int, cameras: int, *, heads: int = 8, backend: str | None = None):
        super().__init__()
        if channels % heads or not 16 <= channels // heads <= 128:
            needed = f"a multiple of heads ({heads}) with 16 to 128 channels each"
            raise ValueError(f"CameraAttention: channels is {channels}, needs {needed}")
        self.heads, self.backend = heads, backend
        self.encoding = CameraTimeSpaceEncoding(channels, cameras)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(
        self,
        queries: torch.Tensor,
        query_camera: torch.Tensor,
        keys: torch.Tensor,
        key_camera: torch.Tensor,
        block_table: torch.Tensor,
        *,
        key_age: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        operation: Callable | None = None,
    ) -> torch.Tensor:
        """queries (Nq, C, H, W), query_camera (Nq,), keys (S, C, h, w), key_camera (S,), block_table (Nq, M; −1 none),
        key_age (S,) seconds into the past, key_mask (S, h·w) bool → (Nq, C, H, W).

        `operation` stands in for `cross_camera_attention`, with its arguments.
        """
        size = queries.shape[-2:]
        now = torch.zeros(len(queries), device=queries.device)
        query = self.query(queries.flatten(2).mT + self.encoding(query_camera, now, size))
        age = torch.zeros(len(keys), device=keys.device) if key_age is None else key_age
        tokens = keys.flatten(2).mT + self.encoding(key_camera, age, keys.shape[-2:])
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in (query, self.key(tokens), self.value(tokens)))
        operation = operation or self._operation
        attended = operation(query, key, value, block_table, key_mask)
        return self.out(attended.flatten(2)).mT.unflatten(-1, size)

    def _operation(self, query, key, value, block_table, key_mask):
        return cross_camera_attention(query, key, value, block_table, key_mask=key_mask, backend=self.backend)
