"""Maps whose cells are the tokens of an attention, with a window round each query's place."""

from collections.abc import Sequence
from typing import NamedTuple


class TokenMap(NamedTuple):
    """A map whose cells are key tokens, row after row, and the side of the square window of cells round a query."""

    height: int
    width: int
    window: int


def flat_maps(operation: str, maps: Sequence[TokenMap]) -> tuple[tuple[int, ...], int]:
    """Returns the maps as (height, width, window, height, …), and how many tokens they have.

    Raises:
        ValueError: `maps` is empty, or one of them is not three integers above 0.
    """
    # Sequence alone is slow to tell, and every call asks
    if not isinstance(maps, (tuple, Sequence)) or len(maps) == 0:
        raise ValueError(f"{operation}: maps is {maps!r}, needs at least one TokenMap")
    flat, tokens = (), 0
    for position, token_map in enumerate(maps):
        numbers = tuple(token_map) if isinstance(token_map, (tuple, Sequence)) else token_map
        integers = isinstance(numbers, tuple) and all(isinstance(n, int) and n > 0 for n in numbers)
        if not integers or len(numbers) != 3:
            needed = "TokenMap(height, width, window) of integers above 0"
            raise ValueError(f"{operation}: maps[{position}] is {numbers!r}, needs {needed}")
        flat, tokens = flat + numbers, tokens + numbers[0] * numbers[1]
    return flat, tokens
