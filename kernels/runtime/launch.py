"""What a launch needs to know about tensors and the device, in one form for every operation.

A kernel takes a tensor as a named tuple: its pointer and its strides by name. An absent tensor is None.
"""

from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch


class Vector(NamedTuple):
    """A tensor (N,)."""

    ptr: Any
    step: int


class Matrix(NamedTuple):
    """A tensor (rows, columns)."""

    ptr: Any
    row: int
    column: int


class Image(NamedTuple):
    """A tensor (N, C, H, W)."""

    ptr: Any
    batch: int
    channel: int
    row: int
    column: int


class Heads(NamedTuple):
    """A tensor (blocks, length, heads, dim) of queries, keys or values."""

    ptr: Any
    block: int
    row: int
    head: int
    column: int


def strided(kind, tensor: torch.Tensor | None):
    """Returns `tensor` as the named tuple `kind`, or None where it is absent."""
    return None if tensor is None else kind(tensor, *tensor.stride())


@cache
def architecture(device: torch.device) -> str:
    """Returns "sm_90", "gfx942", …, or "interpreter" for a tensor that is not on a GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def more_registers(architecture: str, most: int, *versions: str) -> dict[str, int]:
    """Returns the launch option that lets a thread take `most` registers, for those `versions` of triton ("3.6") whose
    assembler by itself keeps to fewer on an NVIDIA GPU and spills; nothing for others, which need no telling."""
    needed = architecture.startswith("sm_") and version("triton").rsplit(".", 1)[0] in versions
    return dict(maxnreg=most) if needed else {}


@cache
def triton_dtype(dtype: torch.dtype):
    """Returns triton's name of a torch dtype, for `ACC_DTYPE` and its like."""
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns float32, or float64 when any operand is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rows_follow(*tensors: torch.Tensor | None) -> bool:
    """Returns whether in every (N, C, H, W) tensor the cells of a map are evenly spaced, row after row."""
    return all(t is None or t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors)


def memory_format(images: torch.Tensor) -> torch.memory_format:
    """Returns the format of results that shall lie as `images` (N, C, H, W) do, which need not be dense."""
    channels_last = images.shape[1] > 1 and images.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format
