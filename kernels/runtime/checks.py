"""Checks of arguments. Messages name the operation, the argument, what came, and what is needed."""

import math
from collections.abc import Sequence
from numbers import Real

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_CELLS = 2**31 - 1

Dims = tuple[str | int, ...]


class Shapes:
    """Binds the named sizes of one call, so that each later argument is held to what the earlier ones said.

    shapes = Shapes("multi_depth_warp")
    channels = shapes.bind("features", features, "S", "C", "Hs", "Ws")[1]
    shapes.bind("projection", projection, "N", 3, 4)
    """

    def __init__(self, operation: str, **sizes: int):
        self.operation = operation
        self.sizes = dict(sizes)

    def bind(self, argument: str, tensor: torch.Tensor, *dims: str | int) -> tuple[int, ...]:
        """Holds `tensor` to `dims`, each a size or the name of one, and returns its shape."""
        return self.bind_one_of(argument, tensor, (dims,))

    def bind_one_of(self, argument: str, tensor: torch.Tensor, alternatives: Sequence[Dims]) -> tuple[int, ...]:
        """Holds `tensor` to the first of several forms that it has, and returns its shape."""
        check_dense(self.operation, argument, tensor)
        for dims in alternatives:
            if tensor.ndim == len(dims) and all(
                self.sizes.get(dim, size) == size if isinstance(dim, str) else dim == size
                for size, dim in zip(tensor.shape, dims)
            ):
                self.sizes.update((dim, size) for dim, size in zip(dims, tensor.shape) if isinstance(dim, str))
                return tuple(tensor.shape)
        needed = " or ".join(self._form(dims) for dims in alternatives)
        raise ValueError(f"{self.operation}: {argument} has shape {tuple(tensor.shape)}, needs {needed}")

    def _form(self, dims):
        names = ", ".join(str(dim) for dim in dims)
        known = ", ".join(str(self.sizes.get(dim, dim)) for dim in dims)
        return f"({names})" if names == known else f"({names}) = ({known})"


def check_dense(operation: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless `tensor` is a tensor with strides: no sparse, nested or opaque one."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operation}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{operation}: {argument} must be a dense tensor, got a {kind} one")


def check_dtype(operation: str, argument: str, tensor: torch.Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless `tensor` is None or has one of the allowed dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{operation}: {argument} is {str(tensor.dtype).removeprefix('torch.')}, needs {names}")


def check_same_device(operation: str, first: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ValueError unless all are on the device of `reference`, the argument named `first`."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{operation}: {argument} is on {tensor.device}, needs {reference.device} like {first}")


def check_indices(operation: str, argument: str, index: torch.Tensor | None, low: int, high: int) -> None:
    """Raises ValueError for an index outside [low, high), where reading it does not synchronise with a device."""
    if index is None or index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    smallest, largest = (int(value) for value in torch.aminmax(index))
    if smallest < low or largest >= high:
        raise ValueError(f"{operation}: {argument} has values from {smallest} to {largest}, needs {low} to {high - 1}")


def check_number(operation: str, argument: str, number: float, needs: str = "a number", *, finite: bool = True) -> None:
    """Raises TypeError unless `number` is one, ValueError where it is NaN or, if `finite`, infinite."""
    if not isinstance(number, (float, int, Real, torch.SymInt, torch.SymFloat)):  # Real alone is slow to tell
        raise TypeError(f"{operation}: {argument} is a {type(number).__name__}, needs {needs}")
    if number != number or (finite and abs(number) == math.inf):  # as torch.compile can trace it
        raise ValueError(f"{operation}: {argument} is {number}, needs {'a finite number' if finite else needs}")


def check_size(operation: str, argument: str, size: tuple[int, int]) -> tuple[int, int]:
    """Returns `size` as (height, width); raises unless it is two integers of at least 0 with at most 2³¹ − 1 cells."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{operation}: {argument} is {size!r}, needs (height, width)")
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 0 for n in size):
        raise ValueError(f"{operation}: {argument} is {size!r}, needs two integers of at least 0")
    height, width = size
    if max(height, 1) * max(width, 1) > MAX_CELLS:
        raise ValueError(f"{operation}: {argument} is {tuple(size)}, needs at most {MAX_CELLS} cells")
    return height, width
