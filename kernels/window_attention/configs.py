"""Tile sizes and warps, as pure functions of architecture, dtype and sizes."""

from ..runtime.launch import more_registers


def by_query(architecture: str, itemsize: int, dim: int, heads: int) -> dict[str, int]:
    """A program has one query and so many of its heads as 256 channels have; 16 of its tokens at a time."""
    row = 1 << (dim - 1).bit_length()
    block_h = max(1, min(256 // row, 1 << (heads - 1).bit_length()))
    warps = max(1, row * block_h * max(itemsize, 4) // 256)
    limit = more_registers(architecture, 128, "3.6") if itemsize == 4 else {}
    return dict(BLOCK_H=block_h, BLOCK_N=16, num_warps=_warps(architecture, warps), **limit)


def by_key(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    """A program has a square of tokens of one head and, some at a time, the queries whose windows touch it.

    Heads that begin anywhere are loaded number by number, which takes the registers of more threads.
    """
    wide = itemsize << (dim - 1).bit_length() >= 256
    warps = 8 if dim % 16 or (wide and itemsize >= 4) else 4 if wide else 2
    limit = more_registers(architecture, 168, "3.6") if itemsize == 2 and (wide or dim % 16) else {}
    return dict(SIDE=4, BLOCK_R=16, BLOCK_M=16, num_warps=_warps(architecture, warps), **limit)


def _warps(architecture: str, warps: int) -> int:
    """AMD's have twice as many threads."""
    return max(1, warps // 2) if architecture.startswith("gfx") else warps
