"""Which backend the operations within a network run on."""

from torch import nn


class OperationModule(nn.Module):
    """A module whose forward pass calls operations of `rigfuse.kernels`, itself or through the modules in it.

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
