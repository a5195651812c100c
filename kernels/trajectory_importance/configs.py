"""Tile sizes."""


def tile(cells: int) -> dict[str, int]:
    """Small maps are cut finer, so that they still fill the multiprocessors."""
    return dict(BLOCK_P=128 if cells < 4096 else 512, num_warps=4)
