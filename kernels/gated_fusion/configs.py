"""Tile sizes, as pure functions of the shapes."""


def tile(channels: int, channels_last: bool) -> dict[str, int]:
    """The tile is long in the dimension that is dense in memory, so that every thread moves 16 bytes."""
    if not channels_last:
        return dict(BLOCK_P=256, BLOCK_C=8, num_warps=4)
    block_c = min(128, max(16, 1 << (channels - 1).bit_length()))
    return dict(BLOCK_P=2048 // block_c, BLOCK_C=block_c, num_warps=4)
