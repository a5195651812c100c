"""Tile sizes, as pure functions of the architecture, the shapes, the dtype and the layout.

`dtype` is the features' unless the sums are float64. The dot of the features' gradient needs 16 in every direction.
"""

import torch

from ..runtime.launch import more_registers


def _channel_block(channels: int, largest: int) -> int:
    return min(largest, max(16, 1 << (channels - 1).bit_length()))


def forward(architecture: str, channels: int, channels_last: bool, dtype: torch.dtype) -> dict[str, int]:
    """A tile is long in the dimension that is dense in memory, so that channels_last threads move 16 bytes.

    The fewer channels a block has, the fewer threads find the same location. BLOCKS is 1, 2 or 4.
    """
    if not channels_last:
        return dict(TILE_H=4, TILE_W=32, BLOCK_C=16, BLOCKS=1, num_warps=4)
    together = _channel_block(channels, 256)
    block_c = min(together, 128 if architecture.startswith("gfx") else 64)  # a warp of 64 lanes there
    config = dict(
        TILE_H=2, TILE_W=max(8, 1024 // together), BLOCK_C=block_c, BLOCKS=together // block_c, num_warps=4
    )  # fmt: skip
    if architecture.startswith("sm_") and dtype.itemsize == 2:
        config["maxnreg"] = 168  # or ptxas keeps to 128 and spills; three programs share a multiprocessor
    return config


def backward_target(architecture: str, channels: int, channels_last: bool, dtype: torch.dtype) -> dict[str, int]:
    """The tiles of target cells, which both backward kernels share: one bounds them, the other skips by the bounds."""
    if dtype == torch.float64:
        return dict(TILE_H=8, TILE_W=8, BLOCK_C=16, num_warps=4)
    if not channels_last:
        return dict(TILE_H=4, TILE_W=8, BLOCK_C=16, num_warps=4, **more_registers(architecture, 200, "3.6"))
    num_warps = 4 if architecture.startswith("gfx") else 8  # a warp of 64 lanes there
    limit = more_registers(architecture, 128, "3.8")
    return dict(TILE_H=4, TILE_W=8, BLOCK_C=_channel_block(channels, 64), num_warps=num_warps, **limit)


def backward_features(architecture: str, channels: int, channels_last: bool, dtype: torch.dtype) -> dict[str, int]:
    """The tiles of source cells, and how many targets and bounds are looked through at once.

    Two stages load for the next visit while one is computed. Exact float32 has not the registers for it: a program less
    would share a multiprocessor.
    """
    tile = dict(SOURCE_H=8, SOURCE_W=8, BLOCK_N=128)
    if dtype == torch.float64:
        return dict(tile, BLOCK_C=16, BLOCK_B=128, num_warps=4, num_stages=1)
    if dtype == torch.float32:  # no tensor core: the operands stay in registers
        return dict(tile, BLOCK_C=_channel_block(channels, 64), BLOCK_B=128, num_warps=4, num_stages=1)
    # Beyond 168 registers sm_100 spills with four warps.
    num_warps = 8 if architecture == "sm_100" else 4
    return dict(tile, BLOCK_C=_channel_block(channels, 128), BLOCK_B=512, num_warps=num_warps, num_stages=2)


def dot(features: torch.dtype, accumulator: torch.dtype) -> tuple[torch.dtype, str]:
    """Operand dtype and precision. A share times a weight needs float16's digits but a wider range: tf32 has both."""
    if accumulator == torch.float64 or features == torch.float32:
        return accumulator, "ieee"
    return (torch.bfloat16, "ieee") if features == torch.bfloat16 else (torch.float32, "tf32")
