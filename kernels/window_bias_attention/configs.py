"""Tile sizes and the cutting of the keys, as pure functions of architecture, dtype and sizes."""


def forward(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    if itemsize < 4:
        block_n = 32 if dim % 16 else 64
        return dict(BLOCK_M=64, BLOCK_N=block_n, num_warps=_warps(architecture, itemsize, dim), num_stages=2)
    return _wide(architecture, itemsize, dim)


def backward_query(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    if itemsize < 4:
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=_warps(architecture, itemsize, dim), num_stages=2)
    if itemsize == 4:
        wide = _row_bytes(itemsize, dim) >= 256
        return dict(BLOCK_M=16, BLOCK_N=16 if wide else 32, **_exact(architecture, itemsize, dim))
    return _wide(architecture, itemsize, dim)


def backward_key(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    if itemsize == 4:
        return dict(BLOCK_M=32, BLOCK_N=16, **_exact(architecture, itemsize, dim))
    block_n = 64 if itemsize < 4 and not (dim % 16 and architecture.startswith("sm_8")) else 32
    # Of four warps several programs share a multiprocessor, and each computes while the others load.
    warps = _warps(architecture, itemsize, dim)
    return dict(BLOCK_M=32, BLOCK_N=block_n, num_warps=warps, num_stages=2 if itemsize < 4 and warps > 4 else 1)


def _wide(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    """Exact float32 products keep both operands in registers."""
    row_bytes = _row_bytes(itemsize, dim)
    return dict(
        BLOCK_M=64 if row_bytes < 256 else 32, BLOCK_N=32 if row_bytes < 256 else 16,
        num_warps=_warps(architecture, itemsize, dim), num_stages=2 if row_bytes < 512 else 1,
    )  # fmt: skip


def _exact(architecture: str, itemsize: int, dim: int) -> dict[str, int]:
    """A float32 product in three of tf32 has three times the operands, all in registers: the tiles are small."""
    wide = _row_bytes(itemsize, dim) >= 256
    return dict(num_warps=_warps(architecture, itemsize, dim), num_stages=1 if wide else 2)


def _warps(architecture: str, itemsize: int, dim: int) -> int:
    """Wide rows want the registers of more threads, and so do heads that begin anywhere, whose loads are scalar; AMD's
    threads have twice as many in groups of four warps."""
    return 4 if architecture.startswith("gfx") or (_row_bytes(itemsize, dim) < 256 and dim % 16 == 0) else 8


def _row_bytes(itemsize: int, dim: int) -> int:
    return itemsize << (dim - 1).bit_length()


def split(architecture: str, tiles: int, keys: int, block_n: int) -> int:
    """Keys for each program, where `tiles` is the number of query tiles of all heads: enough programs to fill a GPU.

    A program never reaches over the end of a map.
    """
    programs = 8 if architecture == "interpreter" else 1024
    splits = max(1, programs // tiles)
    return -(-keys // splits // block_n) * block_n
