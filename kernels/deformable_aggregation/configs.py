"""Tile sizes and warps, as pure functions of the shapes."""

_PROGRAMS = 1024  # enough for every multiprocessor of today's GPUs; fewer anchors share their samples out


def _power(size: int, largest: int) -> int:
    return min(largest, 1 << max(size - 1, 0).bit_length())


def forward(anchors: int, samples: int, channels: int) -> dict[str, int]:
    """anchors: of the whole batch; samples: points times cameras of an anchor. `SPLITS` programs share an anchor."""
    block_e = 128
    splits = max(1, min(_PROGRAMS // max(anchors, 1), -(-samples // block_e)))
    return dict(BLOCK_E=block_e, BLOCK_C=_power(channels, 256), SPLITS=splits, num_warps=4)


def backward_samples(groups: int, channels: int) -> dict[str, int]:
    """channels: of a group."""
    block_k = _power(channels, 128)
    return dict(BLOCK_E=64, BLOCK_G=_power(groups, max(1, 256 // block_k)), BLOCK_K=block_k, num_warps=4)


def backward_maps(channels: int) -> dict[str, int]:
    return dict(BLOCK_E=4, BLOCK_C=_power(channels, 256), num_warps=4)
