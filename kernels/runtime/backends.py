"""Which backend serves a call."""

import importlib.util
import os
from collections.abc import Sequence
from importlib import metadata

import torch

BACKENDS = ("torch", "triton", "definition")
ENVIRONMENT_VARIABLE = "RIGFUSE_BACKEND"
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve the call. The message lists every reason."""


def interpreting() -> bool:
    """Returns whether triton runs in its interpreter. triton reads the variable when it is imported; set it before."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_installed() -> bool:
    """Returns whether triton can be imported."""
    return _TRITON_INSTALLED


def _minor_version(package: str) -> tuple[int, int]:
    major, minor = metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def interpreter_fault() -> str | None:
    """Returns why this triton's interpreter cannot run at all, where it cannot."""
    if triton_installed() and _minor_version("triton") < (3, 7) and _minor_version("numpy") >= (2, 5):
        return "the interpreter of triton 3.6 fails on numpy 2.5, which it predates; use triton 3.7 or numpy 2.4"
    return None


INTERPRETER_FAULT = interpreter_fault() if interpreting() else None  # once: torch.compile cannot trace it


def why_not_triton(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Returns every reason why the Triton backend cannot serve these tensors; empty if it can."""
    reasons = []
    if not triton_installed():
        reasons.append("triton is not installed")
    if interpreting():
        # The interpreter computes bfloat16 wrongly without saying so.
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            reasons.append("triton's interpreter (TRITON_INTERPRET=1) cannot compute bfloat16")
        if INTERPRETER_FAULT is not None:
            reasons.append(INTERPRETER_FAULT)
    elif not all(tensor.is_cuda for tensor in tensors):
        devices = sorted({str(tensor.device) for tensor in tensors if not tensor.is_cuda})
        reasons.append(f"the tensors are on {', '.join(devices)}; triton needs CUDA tensors or TRITON_INTERPRET=1")
    return reasons


def choose_backend(requested: str | None, *tensors: torch.Tensor | None) -> str:
    """Returns the backend that serves a call: the one asked for, or the best where `requested` is None or "auto".

    Raises:
        BackendError: the backend asked for, by argument or by RIGFUSE_BACKEND, does not exist or cannot serve the call.
    """
    asked, asked_by = requested or "auto", "backend"
    if asked == "auto":
        asked, asked_by = os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE
    if asked not in ("auto", *BACKENDS):
        raise BackendError(f"{asked_by} is {asked!r}; choose one of auto, {', '.join(BACKENDS)}")
    if asked in ("torch", "definition"):
        return asked
    reasons = why_not_triton([tensor for tensor in tensors if tensor is not None])
    if asked == "triton" and reasons:
        raise BackendError(f"{asked_by}='triton' cannot serve this call: {'; '.join(reasons)}")
    return "torch" if reasons else "triton"
