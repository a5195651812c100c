"""Argument checks of the public operations. Messages name the argument, what came, and what is needed."""

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


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
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self.operation}: {argument} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != len(dims):
            raise ValueError(self._message(argument, tensor, dims))
        for size, dim in zip(tensor.shape, dims):
            expected = self.sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected:
                raise ValueError(self._message(argument, tensor, dims))
        return tuple(tensor.shape)

    def _message(self, argument, tensor, dims):
        names = ", ".join(str(dim) for dim in dims)
        known = ", ".join(str(self.sizes.get(dim, dim)) for dim in dims)
        needed = f"({names})" if names == known else f"({names}) = ({known})"
        return f"{self.operation}: {argument} has shape {tuple(tensor.shape)}, needs {needed}"


def check_dtype(operation: str, argument: str, tensor: torch.Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless `tensor` is None or has one of the allowed dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{operation}: {argument} is {str(tensor.dtype).removeprefix('torch.')}, needs {names}")


def check_geometry_dtype(operation: str, features: torch.Tensor, **geometry: torch.Tensor | None) -> None:
    """Geometry is float32 whatever the features are; float64 features take float64 geometry too."""
    allowed = (torch.float32, torch.float64) if features.dtype == torch.float64 else (torch.float32,)
    for argument, tensor in geometry.items():
        check_dtype(operation, argument, tensor, allowed)


def check_same_device(operation: str, first: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{operation}: {argument} is on {tensor.device}, needs {reference.device} like {first}")


def check_no_grad(operation: str, **tensors: torch.Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{operation}: {argument} requires grad, but gets no gradient; pass {argument}.detach()")


def check_indices(operation: str, argument: str, index: torch.Tensor | None, low: int, high: int) -> None:
    """Raises ValueError for an index outside [low, high), where reading it does not synchronise with a device."""
    if index is None or index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    smallest, largest = (int(value) for value in torch.aminmax(index))
    if smallest < low or largest >= high:
        raise ValueError(f"{operation}: {argument} has values from {smallest} to {largest}, needs {low} to {high - 1}")
