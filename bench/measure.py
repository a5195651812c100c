"""Time: interleaved repetitions, and on a GPU three figures that answer three questions.

| metric | question | on |
|---|---|---|
| time_ms | how long does the work take? On a GPU between events, launches queued ahead, caches cold | CPU, GPU |
| wall_ms | how long does a person wait for one eager call, launches included? | GPU |
| graph_ms | how long in a CUDA graph, without launches, caches warm? | GPU |
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .workload import Call, Unavailable

METRICS = dict(cpu=("time_ms",), cuda=("time_ms", "wall_ms", "graph_ms"))
GRAPH_REPLAYS = 10
QUEUE_AHEAD_CYCLES = 10_000_000  # about 5 ms, in which the CPU launches everything
_DISTURBED = 1.5  # rounds that differ by more than this, for all providers together, are the machine's doing


@dataclass(frozen=True)
class Summary:
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Effort:
    """How often to repeat: until the interval of every median is at most `enough` of it, at most for `seconds`.

    `least` and `most` rounds come before both. A round takes one sample of each provider.
    """

    seconds: float
    least: int
    most: int = 100
    enough: float = 0.1


def summarise(samples) -> Summary:
    return Summary(*(float(value) for value in np.percentile(samples, [50, 20, 80])))


def median_interval(samples) -> tuple[float, float]:
    """Two of the samples between which the median of all that could be drawn lies, in 19 of 20 cases.

    It supposes nothing about how the samples are distributed. Fewer than six give the least and the largest.
    """
    ordered = np.sort(np.asarray(samples, dtype=float))
    left_out, beyond = 0, 2.0 ** -len(ordered)  # the chance that the median lies beyond so many samples of one end
    while (beyond := beyond + math.comb(len(ordered), left_out + 1) * 2.0 ** -len(ordered)) < 0.025:
        left_out += 1
    return float(ordered[left_out]), float(ordered[-1 - left_out])


def paired_ratios(baseline, other) -> np.ndarray:
    """baseline / other, round by round: both ran within the same moment of the machine's life."""
    rounds = min(len(baseline), len(other))
    return np.asarray(baseline[:rounds]) / np.asarray(other[:rounds])


def disturbed(providers: Iterable[Sequence[float]]) -> bool:
    """Whether the machine was slower in some rounds than in others: `providers` took turns in each.

    What slows one provider alone is not the machine, and neither is a single round of many.
    """
    providers = list(providers)
    rounds = min(map(len, providers), default=0)
    if rounds < 2:
        return False
    slowness = np.array([np.asarray(samples[:rounds]) / np.median(samples) for samples in providers])
    # in a slow round even the least slowed is slow, in a fast one even the most
    slow, fast = np.percentile(slowness.min(axis=0), 90), np.percentile(slowness.max(axis=0), 10)
    return bool(slow > _DISTURBED * fast)


def _is_known(samples, enough: float) -> bool:
    low, high = median_interval(samples)
    return high - low <= enough * high


def interleave(samplers: Mapping[str, Callable[[], float]], effort: Effort) -> dict[str, list[float]]:
    """One sample of each in turn, each round starting with another, until `effort` is satisfied."""
    names = list(samplers)
    samples = {name: [] for name in names}
    end = time.perf_counter() + effort.seconds
    for count in range(effort.most):
        if count >= effort.least:
            known = all(_is_known(values, effort.enough) for values in samples.values())
            if known or time.perf_counter() > end:
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
    """Events round one call whose inputs are in no cache.

    A buffer twice as large as the L2 cache is written, so that nothing of the inputs is left, then another is read:
    else the timed call would have to write the first one's lines back. The GPU is kept busy while the CPU launches, so
    that launch gaps do not count, unless the call itself synchronises with the CPU.
    """
    size = max(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 1 << 20)
    flush, clean = (torch.zeros(size // 4, dtype=torch.float32, device="cuda") for _ in range(2))
    total = torch.zeros((), device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample():
        call.reset()
        flush.zero_()
        torch.sum(clean, dim=0, out=total)
        torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
        start.record()
        result = call.step(mode)
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end)

    return sample


@contextmanager
def _current_stream_kept():
    """A capture that fails leaves its stream current for the rest of the process, in torch 2.11 at least."""
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


def _graph_sampler(call, mode):
    """Events round several replays of the captured call; caches are warm."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm_up(call, mode)
    torch.cuda.current_stream().wait_stream(stream)
    call.reset()
    graph = torch.cuda.CUDAGraph()
    with _current_stream_kept(), torch.cuda.graph(graph):
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
