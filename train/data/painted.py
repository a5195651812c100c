"""Pictures for a drive without any: a textured ground, and far away a sky of patches.

Enough to learn completion from, since the same place looks the same from every camera and at every moment; the
generated world (`world/`) is the realistic one.
"""

import numpy as np
import torch

from ...modules.rig import Camera

_HORIZON = 40.0  # metres from where the ground is drawn no more: its patches would be smaller than pixels
_PATCHES = (0.7, 3.0, 11.0)  # metres


def paint(camera: Camera, world_T_ego: torch.Tensor) -> torch.Tensor:
    """(3, height, width) uint8, what `camera` sees of the world from `world_T_ego`."""
    v, u = np.mgrid[: camera.height, : camera.width].astype(np.float64)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(camera.intrinsics.numpy()).T
    world_T_cam = (world_T_ego @ camera.ego_T_cam).numpy()
    rays, origin = rays @ world_T_cam[:3, :3].T, world_T_cam[:3, 3]
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    down = -rays[..., 2:]
    on_ground = down * _HORIZON > origin[2]
    ground = (origin + rays * (origin[2] / np.where(on_ground, down, 1))) * [1, 1, 0]
    ground = sum(_patches(ground / size, index) for index, size in enumerate(_PATCHES)) / len(_PATCHES)
    colour = np.where(on_ground, 0.1 + 0.7 * ground, 0.4 + 0.6 * _patches(rays * 12, len(_PATCHES)))
    return torch.from_numpy((255 * colour).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _patches(points, seed):
    """A colour in [0, 1] for each cell of a grid, (..., 3) → (..., 3)."""
    x, y, z = np.moveaxis(np.floor(points).astype(np.int64), -1, 0)
    mixed = (x * 73_856_093) ^ (y * 19_349_663) ^ (z * 83_492_791) ^ (seed * 2_654_435_761)
    mixed = (mixed ^ mixed >> 13) * 1_274_126_177 & 0xFFFFFFFF
    return np.stack([(mixed >> shift & 255) / 255 for shift in (0, 8, 16)], axis=-1)
