"""What only a GPU can show, for every operation: races, graphs, the inductor, memory errors, 64-bit offsets."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rigfuse.kernels import cross_camera_attention, multi_depth_warp
from support.operations import EXAMPLES, KERNELS, run

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
# Several tiles in every direction of every kernel.
LARGE = {
    "multi_depth_warp": dict(sources=4, targets=6, channels=96, source=(28, 50), size=(28, 50), depths=2),
    "multi_depth_warp of hypotheses": dict(sources=4, targets=3, channels=96, source=(28, 50), size=(28, 50), depths=6),
    "bev_warp": dict(sources=3, targets=3, channels=64, source=(56, 104), size=(56, 104)),
    "cross_camera_attention": dict(queries=3, length_q=300, heads=4, dim=32, blocks=7, length_k=91, entries=4),
    "window_attention": dict(batch=2, length=200, heads=4, dim=32, maps=((32, 32, 5), (10, 25, 8))),
    "window_bias_attention": dict(batch=2, length=200, heads=4, dim=32, maps=((32, 32, 5), (10, 25, 8))),
    "bias_softmax": dict(shape=(2, 4, 50, 300), bias_shape=(2, 1, 50, 300)),
    "gated_fusion": dict(images=4, channels=96, size=(28, 50)),
    "deformable_aggregation": dict(
        batch=2, anchors=90, points=13, cameras=6, channels=64, groups=8, sizes=((16, 44), (8, 22))
    ),
    "trajectory_importance": dict(trajectories=6, steps=12, size=(28, 50)),
}


def arguments_of(name, dtype):
    """The example at a size that matters on a GPU, images channels last."""
    arguments = EXAMPLES[name].make(dtype, "cuda", LARGE[name])
    is_image = lambda a: isinstance(a, torch.Tensor) and a.ndim == 4 and ("warp" in name or "fusion" in name)  # noqa: E731
    return {k: a.contiguous(memory_format=torch.channels_last) if is_image(a) else a for k, a in arguments.items()}


@pytest.fixture(params=EXAMPLES)
def name(request):
    return request.param


def assert_same_bits(actual, expected):
    for result, value in expected.items():
        assert torch.equal(actual[result], value), result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_250_runs_are_equal_bit_for_bit(name, dtype):
    arguments = arguments_of(name, dtype)
    first = run(EXAMPLES[name], arguments)
    for _ in range(249):
        assert_same_bits(run(EXAMPLES[name], arguments), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replayed_cuda_graph_gives_the_eager_result(name, dtype):
    example, arguments = EXAMPLES[name], arguments_of(name, dtype)
    grad = torch.randn_like(run(example, arguments, wanted=())["out"])
    eager = run(example, arguments, grad=grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(example, arguments, grad=grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(example, arguments, grad=grad)
    for result in captured.values():
        result.fill_(float("nan"))
    graph.replay()
    assert_same_bits(captured, eager)


def test_the_inductor_compiles_the_full_graph(name):
    def call(**arguments):
        returned = EXAMPLES[name].function(**arguments)
        return 2 * (returned[0] if isinstance(returned, tuple) else returned)

    arguments = arguments_of(name, torch.float32)
    expected = run(EXAMPLES[name], arguments, function=call)
    actual = run(EXAMPLES[name], arguments, function=torch.compile(call, fullgraph=True))
    for result, value in expected.items():
        torch.testing.assert_close(actual[result], value)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(name, tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    # Only this package's kernels: torch's own have warnings of theirs, and every kernel more takes time.
    package = EXAMPLES[name].function.__module__.split(".")[-2]
    assert all(kernel.startswith(package) for kernel in KERNELS[name])
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", f"kns={package}"]
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import torch; "
        "from support.operations import EXAMPLES, launched_kernels, run; "
        f"example = EXAMPLES[{name!r}]; arguments = example.make(torch.bfloat16, 'cuda')\n"
        "with launched_kernels() as names: run(example, arguments)\n"
        "torch.cuda.synchronize(); print('launched:', *sorted(set(names)))"
    )
    done = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    (launched,) = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("launched:"))
    assert launched == sorted(KERNELS[name])


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
