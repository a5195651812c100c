"""Tile sizes, as pure functions of architecture, dtype and sizes."""

# Kernel → bytes of an element → largest padded dim → (BLOCK_M, BLOCK_N, num_warps): the largest that spill no register,
# exact float32 at dim 128 excepted, where nothing larger than the smallest tile fits.
_LARGEST = {
    "forward": {
        2: {32: (64, 64, 4), 64: (64, 64, 4), 128: (64, 32, 4)},
        4: {32: (64, 32, 4), 64: (64, 32, 8), 128: (32, 32, 4)},
        8: {128: (16, 16, 4)},
    },
    "backward_query": {
        2: {32: (64, 32, 4), 64: (64, 64, 4), 128: (64, 32, 8)},
        4: {32: (64, 32, 4), 64: (64, 32, 8), 128: (16, 32, 4)},
        8: {128: (16, 16, 4)},
    },
    "backward_key": {
        2: {32: (32, 64, 4), 64: (32, 64, 4), 128: (32, 64, 8)},
        4: {32: (32, 64, 4), 64: (32, 64, 8), 128: (16, 16, 4)},
        8: {128: (16, 16, 4)},
    },
}
# Tensor cores before Hopper take operands from registers.
_LARGEST_SM_8X = {
    "forward": {2: {64: (64, 32, 4)}},
    "backward_query": {4: {64: (16, 32, 4)}},
    "backward_key": {4: {32: (16, 32, 4), 64: (16, 32, 4)}},
}
_LARGEST_GFX = {"backward_key": {4: {64: (32, 32, 4)}}}


def tile(kernel: str, architecture: str, itemsize: int, dim: int, length_q: int, length_k: int) -> dict[str, int]:
    """kernel: forward, backward_query or backward_key."""
    by_dim = dict(_LARGEST[kernel][itemsize])
    if architecture.startswith("sm_8"):
        by_dim |= _LARGEST_SM_8X[kernel].get(itemsize, {})
    elif architecture.startswith("gfx"):
        by_dim |= _LARGEST_GFX.get(kernel, {}).get(itemsize, {})
    block_m, block_n, num_warps = by_dim[min(largest for largest in by_dim if dim <= largest)]
    if dim % 16 and not architecture.startswith("gfx"):  # heads begin anywhere: scalar loads, a pointer each
        largest = 32 if architecture.startswith("sm_8") else 64
        block_m, block_n, num_warps = min(block_m, largest), min(block_n, largest), 8
    # 16 rows are what one warp multiplies; from Hopper on only 64, those of a warp group, use the tensor cores fully.
    rows = 64 if architecture.startswith("sm_") else 16
    overhead_q, overhead_k = (16, rows) if kernel == "backward_key" else (rows, 16)
    return dict(
        BLOCK_M=_cut(length_q, block_m, overhead_q),
        BLOCK_N=_cut(length_k, block_n, overhead_k),
        num_warps=num_warps,
        num_stages=3 if kernel == "forward" and architecture.startswith("sm_8") and itemsize == 2 else 2,
    )


def _cut(length: int, largest: int, overhead: int) -> int:
    """The tile that costs least, where each costs its size and `overhead`: what lies beyond `length` is wasted."""
    sizes = [size for size in (16, 32, 64) if size <= largest]
    return min(sizes, key=lambda size: -(-length // size) * (size + overhead))
