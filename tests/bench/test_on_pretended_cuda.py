"""How the GPU's figures are taken, on a CPU that writes down what a GPU would have been told."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rigfuse.bench import correctness, measure
from rigfuse.bench.operation import PLAIN, make_workload
from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.peers import grid_sample_warp
from rigfuse.bench.workload import Call

L2 = 1 << 20
CPU = torch.device("cpu")


class OnTheCpu(TorchFunctionMode):
    """Puts what should be on "cuda" on the CPU, and writes down every call on it."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_cuda = kwargs.get("device") == "cuda"
        if on_cuda:
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if on_cuda:
            self.told.append(("made", result))
        elif function in (torch.Tensor.zero_, torch.sum):
            self.told.append((function.__name__, args[0]))
        return result


@pytest.fixture
def told(monkeypatch):
    """What the device was told, in order. Streams are numbers."""
    told, streams = [], [0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            told.append(("record", None))

        def elapsed_time(self, other):
            return 1.0

    class Capture:
        """As torch 2.11: where the capture fails, its stream stays current."""

        def __init__(self, graph):
            pass

        def __enter__(self):
            streams.append(7)

        def __exit__(self, kind, *rest):
            if kind is not None:
                raise RuntimeError("capture failed")
            streams.append(0)

    replaced = dict(
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=L2),
        synchronize=lambda: None,
        _sleep=lambda cycles: told.append(("sleep", None)),
        Event=Event,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: told.append(("replay", None))),
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        stream=lambda stream: nullcontext(),
        graph=Capture,
        current_stream=lambda: SimpleNamespace(number=streams[-1], wait_stream=lambda other: None),
        set_stream=lambda stream: streams.append(stream.number),
    )
    for name, replacement in replaced.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    with OnTheCpu(told):
        yield SimpleNamespace(calls=told, streams=streams)


def test_caches_are_cold_and_nothing_is_left_to_be_written_back(told):
    call = Call(lambda: told.calls.append(("call", None)) or torch.ones(1), {}, torch.ones(1))
    sample = measure.sampler("time_ms", call, "fwd", torch.device("cuda"))
    flush, clean, _ = (tensor for what, tensor in told.calls if what == "made")
    assert flush.nbytes >= 2 * L2 and clean.nbytes >= 2 * L2 and flush.data_ptr() != clean.data_ptr()
    told.calls.clear()
    assert sample() == 1.0
    assert [what for what, _ in told.calls] == ["zero_", "sum", "sleep", "record", "call", "record"]
    assert told.calls[0][1] is flush and told.calls[1][1] is clean


def test_a_capture_that_fails_leaves_the_stream_as_it_was(told):
    runs = []

    def run():
        runs.append(told.streams[-1])
        if runs[-1] == 7:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    with pytest.raises(RuntimeError):
        measure.sampler("graph_ms", Call(run, {}, torch.ones(1)), "fwd", torch.device("cuda"))
    assert 7 in runs and torch.cuda.current_stream().number == 0


def test_a_capture_that_succeeds_is_replayed(told):
    sample = measure.sampler("graph_ms", Call(lambda: torch.ones(1), {}, torch.ones(1)), "fwd", torch.device("cuda"))
    told.calls.clear()
    assert sample() == 1.0 / measure.GRAPH_REPLAYS
    assert [what for what, _ in told.calls].count("replay") == measure.GRAPH_REPLAYS


class WaitsForTheCpu(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects what a GPU would have to wait for, and what no CUDA graph can hold."""

    WAITS = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        self.found |= {name} & set(self.WAITS)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_baseline_waits_for_the_cpu(name, monkeypatch):
    """What is timed is work; and a call that copies a list of Python's to the device cannot be captured."""
    workload = make_workload(OPERATIONS[name], "tiny", CPU)
    # The operations' checks of values are left out on a GPU, and on a CPU only where the compiler traces them.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = (PLAIN, "sdpa", "grid_sample", "unbiased-eager", "unbiased-sdpa")
    baselines = [provider for provider in plain if provider in workload.groups]
    for baseline in baselines:
        call = workload.build(baseline, torch.float32)
        with WaitsForTheCpu() as waits:
            for mode in workload.modes:
                call.step(mode)
        assert not waits.found, f"{baseline} of {name}: {waits.found}"


def test_a_copied_list_would_be_seen():
    with WaitsForTheCpu() as waits:
        torch.ones(2).new_tensor([1.0, 2.0])
    assert waits.found == {"lift_fresh"}


def test_the_sampling_grid_divides_by_the_right_side():
    """A whole-cell shift of a map that is wider than high."""
    features = torch.arange(15.0).view(1, 1, 3, 5)
    projection = torch.eye(3, 4)[None]
    offsets = torch.tensor([2.0, 1.0]).expand(1, 1, 3, 5, 2)
    warped, coverage = grid_sample_warp(features, projection, torch.tensor([10.0]), offsets=offsets)
    assert correctness.relative_error(warped[0, 0, :2, :3], features[0, 0, 1:, 2:]) < 1e-5
    assert coverage[0, :2, :3].eq(1).all() and coverage[0, 2].eq(0).all() and coverage[0, :, 3:].eq(0).all()
