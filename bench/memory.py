"""Peak memory of a call above what was there before it: exact and repeatable, on the CPU too."""

import gc
import os
from contextlib import contextmanager

import torch

from .workload import Call

_RANGE = "rigfuse::bench::peak"


def peak_bytes(call: Call, mode: str, device: torch.device, warm_up: bool = True) -> int:
    """The most that `call.step(mode)` holds at any moment beyond what was there before, results included.

    What it releases of that (the oldest moment of a history) is counted too. warm_up: the call has not run in this
    mode yet; what it allocates once and keeps is not its own.
    """
    if warm_up:
        call.reset()
        call.step(mode)
    measure = _peak_on_cuda if device.type == "cuda" else peak_on_cpu
    return measure(call.reset, lambda: call.step(mode))


def peak_on_cpu(prepare, function) -> int:
    """Adds up every allocation and release that PyTorch's allocator reports while `function` runs.

    Temporaries inside operators are seen; what libraries take from malloc themselves (oneDNN's scratchpads) is not.
    Releases are reported for what was allocated in `prepare` or since.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle would make the figure depend on what ran before
    try:
        with _silent_stderr(), torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
            prepare()
            with torch.autograd.profiler.record_function(_RANGE):
                result = function()
            del result
    finally:
        if collecting:
            gc.enable()
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = before = peak = 0
    for event in events:
        if event.name() == _RANGE:
            before = peak = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - before


def _peak_on_cuda(prepare, function) -> int:
    gc.collect()
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def _silent_stderr():
    """The profiler and the allocator write notes to file descriptor 2, whatever their log level is."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
