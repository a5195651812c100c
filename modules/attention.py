"""Attention from the maps of some cameras to the maps of others."""

import torch
from torch import nn

from ..kernels import cross_camera_attention
from .operations import OperationModule
from .positions import CameraTimeSpaceEncoding


def check_heads(name: str, heads: int, channels: int, smallest: int = 16) -> None:
    """Raises ValueError, naming the setting, unless every head has an equal share of `smallest` to 128 channels."""
    if channels % heads or not smallest <= channels // heads <= 128:
        raise ValueError(f"{name} is {heads}, needs to divide the {channels} channels into heads of {smallest} to 128")


class CameraAttention(OperationModule):
    """Multi-head attention between camera maps; every token is told which camera, when and where it comes from.

    Args:
        channels: C of queries and keys.
        cameras: number of cameras of the rig.
        heads: attention heads, of 16 to 128 channels each.
        backend: of `cross_camera_attention`.
    """

    def __init__(self, channels: int, cameras: int, *, heads: int, backend: str | None = None):
        super().__init__()
        check_heads("CameraAttention: heads", heads, channels)
        self.heads = heads
        self.encoding = CameraTimeSpaceEncoding(channels, cameras)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.backend = backend

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
    ) -> torch.Tensor:
        """Lets the cells of each query map attend to all cells of the key maps that the block table lists for it.

        Args:
            queries: (Nq, C, H, W); gets gradients.
            query_camera: (Nq,) int, the camera of each query map.
            keys: (S, C, h, w); gets gradients.
            key_camera: (S,) int, the camera of each key map.
            block_table: (Nq, M) int, the key maps that a query map attends to; −1 = none.
            key_age: (S,) seconds into the past; None = all of the present.
            key_mask: (S, h·w) bool, False = nobody attends to this cell; None = every cell counts.

        Returns:
            (Nq, C, H, W).
        """
        size = queries.shape[-2:]
        now = torch.zeros(len(queries), device=queries.device)
        query = self.query(queries.flatten(2).mT + self.encoding(query_camera, now, size))
        age = torch.zeros(len(keys), device=keys.device) if key_age is None else key_age
        tokens = keys.flatten(2).mT + self.encoding(key_camera, age, keys.shape[-2:])
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in (query, self.key(tokens), self.value(tokens)))
        attended = cross_camera_attention(query, key, value, block_table, key_mask=key_mask, backend=self.backend)
        return self.out(attended.flatten(2)).mT.unflatten(-1, size)
