"""Backend choice and profiler ranges, the same for every operation."""

import pytest
import torch

from rigfuse.kernels import BackendError, gated_fusion
from rigfuse.kernels.runtime import backends
from rigfuse.kernels.runtime.backends import choose_backend
from support.operations import OPERATIONS, forward_and_gradients

CPU = torch.zeros(2)
BFLOAT16 = torch.zeros(2, dtype=torch.bfloat16)


@pytest.fixture
def no_preference(monkeypatch):
    monkeypatch.delenv("RIGFUSE_BACKEND", raising=False)


@pytest.fixture
def no_interpreter(monkeypatch, no_preference):
    monkeypatch.setattr(backends, "interpreting", lambda: False)


def test_auto_is_triton_in_the_interpreter_and_torch_elsewhere_on_a_cpu(no_preference, monkeypatch, device):
    if device == "cuda":
        assert choose_backend(None, CPU.cuda()) == "triton"
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    assert choose_backend(None, CPU, None) == choose_backend("auto", CPU) == "triton"
    assert choose_backend(None, BFLOAT16) == "torch"  # which the interpreter would get wrong
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    assert choose_backend(None, CPU) == "torch"


def test_the_environment_changes_auto_only(no_preference, monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    monkeypatch.setenv("RIGFUSE_BACKEND", "torch")
    assert choose_backend(None, CPU) == "torch" and choose_backend("triton", CPU) == "triton"
    monkeypatch.setenv("RIGFUSE_BACKEND", "")
    assert choose_backend(None, CPU) == "triton"
    monkeypatch.setenv("RIGFUSE_BACKEND", "tritan")
    with pytest.raises(BackendError, match="RIGFUSE_BACKEND is 'tritan'; choose one of auto, torch, triton"):
        choose_backend(None, CPU)


def test_a_backend_asked_for_by_name_never_falls_back(no_interpreter, monkeypatch):
    with pytest.raises(BackendError, match="the tensors are on cpu; triton needs CUDA tensors"):
        choose_backend("triton", CPU)
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    with pytest.raises(BackendError, match="triton is not installed; .*cannot compute bfloat16"):
        choose_backend("triton", BFLOAT16)
    with pytest.raises(ValueError, match="backend is 'flash'"):
        choose_backend("flash", CPU)


def test_ranges_show_in_the_profiler(device):
    inputs = [torch.randn(2, 4, 3, 3, device=device, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile() as profile:
        gated_fusion(*inputs, backend="triton").sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"rigfuse::gated_fusion", "rigfuse::gated_fusion.backward"} <= names


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_repeats_itself_bit_for_bit(name, device, monkeypatch):
    monkeypatch.setenv("RIGFUSE_BACKEND", "triton" if device == "cuda" else "torch")
    call, inputs = OPERATIONS[name](device, torch.float32)
    first, second = (forward_and_gradients(call, inputs) for _ in range(2))
    assert all(result.isfinite().all() and result.any() for result in first)
    assert all(torch.equal(one, other) for one, other in zip(first, second))
