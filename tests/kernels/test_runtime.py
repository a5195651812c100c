"""Backend choice and profiler ranges, the same for every operation."""

import importlib
import sys
from contextlib import contextmanager

import pytest
import torch

from rigfuse.kernels import BackendError, gated_fusion
from rigfuse.kernels.runtime import backends, operation
from rigfuse.kernels.runtime import launch as launching
from rigfuse.kernels.runtime import nvtx as ranges
from rigfuse.kernels.runtime.backends import choose_backend
from support.operations import EXAMPLES, run

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
    with pytest.raises(
        BackendError, match="RIGFUSE_BACKEND is 'tritan'; choose one of auto, torch, triton, definition"
    ):
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


def test_without_the_package_nvtx_the_profiler_alone_sees_the_ranges(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    try:
        importlib.reload(ranges)
        assert ranges.nvtx is None
        with ranges.annotate("quiet"), torch.profiler.profile() as profile, ranges.annotate("seen"):
            pass
    finally:
        monkeypatch.undo()
        importlib.reload(ranges)
    assert "rigfuse::seen" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_kernels_are_launched_on_the_device_of_their_tensors(name, monkeypatch, device):
    """triton takes the current device, which may be another GPU: forward and backward launch under the guard only."""
    example = EXAMPLES[name]
    guarded, launched = [], []

    @contextmanager
    def guard(tensor):
        guarded.append(tensor.device)
        yield
        guarded.pop()

    def watched(function):
        def launch(first, *others):
            launched.append(function.__name__)
            assert guarded == [(first[0] if isinstance(first, list) else first).device]
            return function(first, *others)

        return launch

    triton = importlib.import_module(f"{example.function.__module__.removesuffix('.api')}.triton")
    for launch in ("launch_forward", "launch_backward"):
        if hasattr(triton, launch):
            monkeypatch.setattr(triton, launch, watched(getattr(triton, launch)))
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    run(example, example.make(torch.float32, device, example.tiny), backend="triton")
    assert launched == ["launch_forward", "launch_backward"][: 1 + bool(example.table.gradients)] and not guarded


def test_the_guard_is_torch_s_own(device):
    assert isinstance(operation.on_device_of(torch.zeros(1, device=device)), torch.cuda.device_of)


def test_an_interpreter_that_cannot_run_says_so_in_one_line(no_preference, monkeypatch):
    """triton 3.6 on numpy 2.5."""
    versions = dict(triton="3.6.0", numpy="2.5.1")
    monkeypatch.setattr(backends.metadata, "version", versions.get)
    fault = backends.interpreter_fault()
    assert fault is not None and "\n" not in fault
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    monkeypatch.setattr(backends, "INTERPRETER_FAULT", fault)
    with pytest.raises(BackendError, match="cannot serve this call: the interpreter of triton 3.6 fails on numpy 2.5"):
        choose_backend("triton", CPU)
    assert choose_backend(None, CPU) == "torch"
    versions["triton"] = "3.7.0"
    assert backends.interpreter_fault() is None


@pytest.mark.parametrize(
    "version, architecture, told",
    [("3.6.0", "sm_90", True), ("3.6.0", "gfx942", False), ("3.6.0", "interpreter", False),
     ("3.7.1", "sm_90", False), ("3.8.0", "sm_90", True)],
)  # fmt: skip
def test_only_versions_that_spill_are_told_how_many_registers_a_thread_may_take(
    version, architecture, told, monkeypatch
):
    monkeypatch.setattr(launching, "version", lambda package: version)
    assert launching.more_registers.__wrapped__(architecture, 128, "3.6", "3.8") == (dict(maxnreg=128) if told else {})
