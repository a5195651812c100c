"""Tile sizes and warps, as pure functions of the architecture, the shapes, the dtype and the layout."""

from ..runtime.launch import more_registers

_PROGRAMS = 1024  # enough for every multiprocessor of today's GPUs; fewer anchors share their samples out


def _power(size: int, largest: int) -> int:
    return min(largest, 1 << max(size - 1, 0).bit_length())


def forward(
    architecture: str, itemsize: int, anchors: int, samples: int, channels: int, channels_last: bool
) -> dict[str, int]:
    """anchors: of the whole batch; samples: points times cameras of an anchor. `SPLITS` programs share an anchor.

    Two warps read four corners 16 bytes a thread; where channels are apart in memory that takes too many registers.
    """
    block_e = 64
    splits = max(1, min(_PROGRAMS // max(anchors, 1), -(-samples // block_e)))
    config = dict(BLOCK_E=block_e, BLOCK_C=_power(channels, 256), SPLITS=splits, num_warps=2 if channels_last else 4)
    return config | _limit(architecture, itemsize, channels_last, "3.8")


def backward_samples(
    architecture: str, itemsize: int, groups: int, channels: int, channels_last: bool
) -> dict[str, int]:
    """channels: of a group. Fewer warps than here spill on one architecture or another."""
    block_k = _power(channels, 128)
    num_warps = 2 if _wide_warps(architecture) else 4 if channels_last else 8
    config = dict(BLOCK_E=64, BLOCK_G=_power(groups, max(1, 256 // block_k)), BLOCK_K=block_k, num_warps=num_warps)
    versions = ("3.8",) if channels_last else ("3.6", "3.8")
    return config | _limit(architecture, itemsize, channels_last, *versions)


def backward_maps(architecture: str, channels: int) -> dict[str, int]:
    return dict(BLOCK_E=4, BLOCK_C=_power(channels, 256), num_warps=2 if _wide_warps(architecture) else 4)


def _limit(architecture: str, itemsize: int, channels_last: bool, *versions: str) -> dict[str, int]:
    return {} if channels_last and itemsize != 4 else more_registers(architecture, 128, *versions)


def _wide_warps(architecture: str) -> bool:
    """A warp of 64 threads, of which half as many read 16 bytes each."""
    return architecture.startswith("gfx")
