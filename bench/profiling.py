"""Runs under named ranges, for nsys on a GPU and as a trace of torch.profiler on a CPU. Nothing is timed."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ..kernels.runtime.nvtx import annotate
from .workload import Unavailable, Workload

REPEATS = 5


def profile_on_cuda(workloads: Iterable[Workload], dtype: torch.dtype, modes: tuple[str, ...]) -> None:
    """Between cudaProfilerStart and …Stop, for `nsys profile -t cuda,nvtx --capture-range=cudaProfilerApi`.

    nsys ends the process at the stop unless told otherwise, so nothing may come after it.
    """
    torch.cuda.cudart().cudaProfilerStart()
    for workload in workloads:
        _run(workload, dtype, modes)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def profile_on_cpu(workloads: Iterable[Workload], dtype: torch.dtype, modes: tuple[str, ...], folder: Path) -> None:
    """Writes `trace.json`, for Perfetto or chrome://tracing; it shows the same ranges as nsys does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for workload in workloads:
            _run(workload, dtype, modes)
    profiler.export_chrome_trace(str(folder / "trace.json"))


def _run(workload: Workload, dtype: torch.dtype, modes: tuple[str, ...]) -> None:
    """Every provider a few times in the range `scope/case/provider/mode`, after a run in the range `warm-up`."""
    for provider in workload.timed:
        try:
            call = workload.build(provider, dtype)
            for mode in (mode for mode in modes if mode in workload.modes):
                name = f"{workload.scope}/{workload.case}/{provider}/{mode}"
                for label in ("warm-up", *[name] * REPEATS):
                    call.reset()
                    with annotate(label):
                        call.step(mode)
        except (Unavailable, RuntimeError, ValueError, ImportError):
            continue  # a run that measures says why
