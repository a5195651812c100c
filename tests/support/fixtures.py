"""Fixtures shared by the tests of the operations."""

import pytest
import torch

from rigfuse.kernels.runtime import backends
from support.memory import GuardedAllocations


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    if backends.interpreting() and backends.triton_installed():
        from support.interpreter import patch_once

        patch_once()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(params=["float64", "float32", "float16", "bfloat16"])
def dtype(request, device):
    """Every dtype that the leg can compute: the interpreter is silently wrong in bfloat16."""
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("bfloat16 is computed on the GPU only")
    return getattr(torch, request.param)


@pytest.fixture(params=["definition", "torch", "triton"])
def any_backend(request):
    return request.param


@pytest.fixture
def guarded_allocations(monkeypatch):
    """Every `torch.empty*` is filled with NaN and lies between guard bands, which must be intact at the end."""
    with GuardedAllocations(monkeypatch) as guard:
        yield guard
