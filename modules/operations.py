"""Which backend the operations within a network run on."""

import torch
from torch import nn


class OperationModule(nn.Module):
    """A module whose forward pass calls operations of `rigfuse.kernels`, itself or through the modules in it.

    Its weights are float32 or float64, since metres, pixels and statistics are among what it computes; `.half()` and
    `.bfloat16()` raise TypeError. `torch.autocast` narrows what may be narrow.

    Attributes:
        backend: of these operations: None, "torch", "triton" or "definition", see `rigfuse.kernels`. Setting it, at any
            time, sets it for every `OperationModule` within.
    """

    def __init__(self):
        super().__init__()
        self._backend = None

    @property
    def backend(self) -> str | None:
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        for module in self.modules():
            if isinstance(module, OperationModule):
                module._backend = name

    def _apply(self, fn, recurse=True):
        dtype = fn(torch.zeros(0)).dtype
        if dtype in (torch.float16, torch.bfloat16):
            name, narrow = type(self).__name__, str(dtype).removeprefix("torch.")
            raise TypeError(f"{name} keeps its weights in float32 or float64, got {narrow}; use torch.autocast instead")
        return super()._apply(fn, recurse)
