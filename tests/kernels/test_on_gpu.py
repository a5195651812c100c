"""What only a GPU can show, for every operation: races, graphs, the inductor, memory errors, 64-bit offsets."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rigfuse.kernels import cross_camera_attention, multi_depth_warp
from support.operations import OPERATIONS, forward_and_gradients

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_250_runs_are_equal_bit_for_bit(operation, dtype):
    call, inputs = operation("cuda", dtype)
    first = forward_and_gradients(call, inputs)
    for _ in range(249):
        for one, other in zip(first, forward_and_gradients(call, inputs)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replayed_cuda_graph_gives_the_eager_result(operation, dtype):
    call, inputs = operation("cuda", dtype)
    grad = torch.randn_like(call(*inputs))
    eager = forward_and_gradients(call, inputs, grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_gradients(call, inputs, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(call, inputs, grad)
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    for one, other in zip(eager, captured):
        assert torch.equal(one, other)


def test_the_inductor_compiles_the_full_graph(operation):
    call, inputs = operation("cuda", torch.float32)
    compiled = torch.compile(lambda *tensors: call(*tensors) * 2, fullgraph=True)
    expected = forward_and_gradients(lambda *tensors: call(*tensors) * 2, inputs)
    for one, other in zip(expected, forward_and_gradients(compiled, inputs)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(operation, tool, request):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    name = next(name for name, case in OPERATIONS.items() if case is operation)
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import torch; "
        "from support.operations import OPERATIONS, forward_and_gradients; "
        f"forward_and_gradients(*OPERATIONS[{name!r}]('cuda', torch.bfloat16)); torch.cuda.synchronize()"
    )
    # Only this package's kernels: torch's own have warnings of theirs, and every kernel more takes time.
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        f"kns={name.split('_')[0]}",
    ]
    done = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_indices_out_of_range_read_nothing():
    features = torch.randn(2, 16, 8, 8, device="cuda", requires_grad=True)
    index = torch.tensor([5, -3, 1], device="cuda")
    projection = torch.eye(3, 4, device="cuda").repeat(3, 1, 1)
    warped, coverage = multi_depth_warp(features, projection, torch.tensor([10.0], device="cuda"), source_index=index)
    assert not warped[:2].any() and not coverage[:2].any()
    torch.testing.assert_close(warped[2], features[1])
    key = torch.randn(2, 20, 2, 32, device="cuda")
    query = torch.randn(2, 9, 2, 32, device="cuda")
    out = cross_camera_attention(query, key, key, torch.tensor([[7, -5], [1, 99]], device="cuda"))
    assert not out[0].any()
    expected = cross_camera_attention(query, key, key, torch.tensor([[-1, -1], [1, -1]], device="cuda"))
    torch.testing.assert_close(out, expected)


def test_tensors_beyond_two_billion_elements():
    sources = 2**31 // (128 * 112 * 200) + 2
    features = torch.zeros(sources, 128, 112, 200, dtype=torch.bfloat16, device="cuda")
    features = features.contiguous(memory_format=torch.channels_last)
    features[-1].normal_()
    projection = torch.eye(3, 4, device="cuda")[None]
    index = torch.tensor([sources - 1], device="cuda")
    warped, _ = multi_depth_warp(features, projection, torch.tensor([10.0], device="cuda"), source_index=index)
    assert torch.equal(warped[0], features[-1])
    blocks = 2**31 // (1024 * 8 * 64) + 2
    key = torch.zeros(blocks, 1024, 8, 64, dtype=torch.bfloat16, device="cuda")
    key[-1].normal_()
    query = torch.randn(1, 64, 8, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.tensor([[blocks - 1]], device="cuda")
    out = cross_camera_attention(query, key, key, table)
    torch.testing.assert_close(out, cross_camera_attention(query, key[-1:], key[-1:], torch.zeros_like(table)))
