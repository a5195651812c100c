"""What a launch needs to know about the device, in one form for every operation's `configs.py`."""

from functools import cache

import torch


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …, or "interpreter" for a tensor that is not on a GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def triton_dtype(dtype: torch.dtype):
    """The triton name of a torch dtype, for `ACC_DTYPE` and its like."""
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float32, or float64 when any operand is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def strided(tensor: torch.Tensor | None) -> tuple:
    """A kernel argument: (pointer, strides…), or (None,) for a tensor that is absent."""
    return (None,) if tensor is None else (tensor, *tensor.stride())


def rows_follow(*tensors: torch.Tensor | None) -> bool:
    """Whether in every (N, C, H, W) tensor the cells of a map are evenly spaced, row after row."""
    return all(t is None or t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors)


def memory_format(images: torch.Tensor) -> torch.memory_format:
    """Of results that are to have the layout of `images` (N, C, H, W), which need not be dense."""
    channels_last = images.shape[1] > 1 and images.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format
