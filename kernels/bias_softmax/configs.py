"""Tile sizes, as pure functions of the shapes."""


def forward(keys: int) -> dict[str, int]:
    return _tile(keys, 32_768)


def backward(keys: int) -> dict[str, int]:
    return _tile(keys, 16_384)


def _tile(keys: int, largest: int) -> dict[str, int]:
    """A whole row where its registers allow, else tiles that waste little of the last."""
    block_k = max(128, 1 << (keys - 1).bit_length())
    if block_k > largest:
        block_k = 4096
    return dict(BLOCK_K=block_k, num_warps=max(1, min(16, block_k // 512)))


def chunk(bias_rows: int, sharing: int) -> int:
    """How many of the `sharing` rows that share a row of the bias one program walks: enough programs to fill a GPU."""
    chunks = max(1, min(sharing, 1024 // bias_rows))
    return -(-sharing // chunks)
