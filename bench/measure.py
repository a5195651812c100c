"""Time: interleaved repetitions, and on a GPU three figures that answer three questions.

| metric | question | on |
|---|---|---|
| time_ms | how long does the work take? On a GPU between events, launches queued ahead, caches cold | CPU, GPU |
| wall_ms | how long does a person wait for one eager call, launches included? | GPU |
| graph_ms | how long in a CUDA graph, without launches, caches warm? | GPU |
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .workload import Call, Unavailable

METRICS = dict(cpu=("time_ms",), cuda=("time_ms", "wall_ms", "graph_ms"))
GRAPH_REPLAYS = 10
QUEUE_AHEAD_CYCLES = 10_000_000  # about 5 ms, in which the CPU launches everything


@dataclass(frozen=True)
class Summary:
    median: float
    p20: float
    p80: float


def summarise(samples) -> Summary:
    return Summary(*(float(value) for value in np.percentile(samples, [50, 20, 80])))


def paired_ratio(baseline, other) -> Summary:
    """baseline / other, round by round: both ran within the same moment of the machine's life."""
    rounds = min(len(baseline), len(other))
    return summarise(np.asarray(baseline[:rounds]) / np.asarray(other[:rounds]))


def interleave(samplers: Mapping[str, Callable[[], float]], seconds: float, least: int, most: int) -> dict[str, list]:
    """One sample of each in turn, each round starting with another, until the time is up."""
    names = list(samplers)
    samples = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for count in range(most):
        if count >= least and time.perf_counter() > end:
            break
        shift = count % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(samplers[name]())
    return samples


def _warm_up(call, mode):
    call.reset()
    call.step(mode)


def sampler(metric: str, call: Call, mode: str, device: torch.device) -> Callable[[], float]:
    """A function that takes one sample, in milliseconds; raises `Unavailable` or RuntimeError if there can be none."""
    if metric == "graph_ms" and call.capturable is not True:
        raise Unavailable(f"no CUDA graph: {call.capturable}")
    _warm_up(call, mode)
    if device.type == "cpu":
        return lambda: _cpu_time(call, mode)
    if metric == "time_ms":
        return _cold_cache_sampler(call, mode)
    if metric == "wall_ms":
        return lambda: _cuda_wall_time(call, mode)
    return _graph_sampler(call, mode)


def _cpu_time(call, mode):
    call.reset()
    start = time.perf_counter_ns()
    result = call.step(mode)
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed / 1e6


def _cuda_wall_time(call, mode):
    call.reset()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    result = call.step(mode)
    torch.cuda.synchronize()
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed / 1e6


def _cold_cache_sampler(call, mode):
    """Events round one call after the L2 cache was overwritten.

    The GPU is kept busy while the CPU launches, so that launch gaps do not count, unless the call itself
    synchronises with the CPU.
    """
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample():
        call.reset()
        flush.zero_()
        torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
        start.record()
        result = call.step(mode)
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end)

    return sample


def _graph_sampler(call, mode):
    """Events round several replays of the captured call; caches are warm."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm_up(call, mode)
    torch.cuda.current_stream().wait_stream(stream)
    call.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call.step(mode)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(kept=kept):  # the captured results live as long as the graph
        torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
        start.record()
        for _ in range(GRAPH_REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / GRAPH_REPLAYS

    return sample
