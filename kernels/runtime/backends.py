"""Which backend serves a call."""

import importlib.util
import os
from collections.abc import Sequence

import torch

BACKENDS = ("torch", "triton")
ENVIRONMENT_VARIABLE = "RIGFUSE_BACKEND"


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve the call. The message lists every reason."""


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether triton runs in its interpreter. triton reads the variable when it is imported; so set it before."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _default_backend() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def why_not_triton(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Every reason why the Triton backend cannot serve these tensors; empty if it can."""
    reasons = []
    if not triton_installed():
        reasons.append("triton is not installed")
    if interpreting():
        # The interpreter computes bfloat16 wrongly without saying so.
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            reasons.append("triton's interpreter (TRITON_INTERPRET=1) cannot compute bfloat16")
    elif not all(tensor.is_cuda for tensor in tensors):
        devices = sorted({str(tensor.device) for tensor in tensors if not tensor.is_cuda})
        reasons.append(f"the tensors are on {', '.join(devices)}; triton needs CUDA tensors or TRITON_INTERPRET=1")
    return reasons


def choose_backend(requested: str | None, *tensors: torch.Tensor | None) -> str:
    """The backend that serves a call on `tensors`: the one asked for, or the best where `requested` is None or "auto".

    Raises:
        BackendError: the backend asked for, by argument or by RIGFUSE_BACKEND, does not exist or cannot serve the call.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    asked, asked_by = requested or "auto", "backend"
    if asked == "auto":
        asked, asked_by = _default_backend(), ENVIRONMENT_VARIABLE
    if asked not in ("auto", *BACKENDS):
        raise BackendError(f"{asked_by} is {asked!r}; choose one of auto, {', '.join(BACKENDS)}")
    if asked == "torch":
        return "torch"
    reasons = why_not_triton(present)
    if asked == "triton":
        if reasons:
            raise BackendError(f"{asked_by}='triton' cannot serve this call: {'; '.join(reasons)}")
        return "triton"
    return "torch" if reasons else "triton"
