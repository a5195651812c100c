"""The providers compute the same function where they should, with gradients; and what each of them reads."""

import ctypes
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from rigfuse import kernels
from rigfuse.bench import correctness, cuda_warp, step
from rigfuse.bench.geometry import moments
from rigfuse.bench.implementations import IMPLEMENTATIONS, operation_of, operations_of
from rigfuse.bench.operation import make_workload
from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.peers import grid_sample_warp
from rigfuse.bench.stage import Case
from rigfuse.bench.subjects import compare
from rigfuse.bench.subjects.compare import CASES
from rigfuse.bench.workload import MODES, Unavailable
from rigfuse.modules import attention
from rigfuse.modules.completion import planning_guided, temporal
from rigfuse.train.data import open_drives
from rigfuse.train.systems import experiment

CPU = torch.device("cpu")
SMALL = Case("small", "", image=(128, 192), channels=32, heads=2, moments=2, batch=2, missing=(0, 3))


@pytest.fixture(scope="module")
def drives():
    return open_drives(None)


@pytest.mark.parametrize("scope", ["attention", "temporal"])
def test_outputs_and_gradients_are_equal_where_the_topologies_are(scope, drives):
    workload = compare.make_workload(scope, SMALL, ("v1", "v2"), CPU, drives)
    results = {name: correctness.compute(workload.build(name, torch.float64), MODES) for name in workload.groups}
    for group in workload.plain:
        reference = correctness.compute(workload.build_reference(group), MODES)
        for name in (name for name, its_group in workload.groups.items() if its_group == group):
            assert correctness.errors(results[name], reference).worst < 1e-6  # a warp's offsets are float32 throughout
    assert correctness.errors(results["v1"], results["v2"]).worst > 1e-3  # topology does change the result
    assert ("v3" in results) == (scope == "temporal")
    assert len(results["v1"].grads) >= 3 and all(grad.abs().max() > 0 for grad in results["v1"].grads.values())


@pytest.mark.parametrize("scope, case", [("temporal", SMALL), ("step", CASES["tiny"])])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_call_gives_the_same_every_time(version, scope, case, drives):
    call = compare.make_workload(scope, case, (version,), CPU, drives).build(version, torch.float32)
    assert bool(call.jumps) == (version == "v2") and call.jumps < call.leaves.keys()
    first, second = (correctness.compute(call, MODES) for _ in range(2))
    assert correctness.errors(first, second).worst == 0


def test_a_training_step_has_the_losses_of_its_topology_whatever_computes_it(drives):
    """Losses and gradients are equal since all draw the same noise, in float64 too; the losses are float32."""
    case = replace(CASES["tiny"], batch=2, moments=2, missing=(0, 3))
    workload = compare.make_workload("step", case, ("v1", "v2"), CPU, drives)
    results = {name: correctness.compute(workload.build(name, torch.float64), ("step",)) for name in workload.groups}
    assert correctness.errors(results["v1-fused"], results["v1"]).worst < 1e-5
    assert correctness.errors(results["v2"], results["v2-eager"]).worst < 1e-5
    assert correctness.errors(results["v1-sdpa"], results["v1"]).worst < 1e-5
    assert correctness.errors(results["v3"], results["v3-eager"]).worst < 1e-5
    assert correctness.errors(results["v1"], results["v2"]).worst > 1e-3
    reference = correctness.compute(workload.build_reference("neighbours"), ("step",))
    single = correctness.compute(workload.build("v2", torch.float32), ("step",))
    assert max(correctness.errors(single, reference).outputs.values()) < 1e-5
    assert len(results["v2"].outputs) == 1 + len({"ssl", "vae_rec", "vae_kl", "planning_guided"})
    frozen = {name for name in results["v2"].grads if name.startswith("backbone")}
    stages = {name.split(".")[0] for name, grad in results["v2"].grads.items() if grad.abs().max() > 0}
    assert not frozen and stages == {"temporal", "vae", "planning"}


def test_the_reference_of_a_training_step_draws_the_noise_of_float32():
    like = torch.zeros(2, 8, 4, 6)
    torch.manual_seed(1)
    single = torch.randn_like(like)
    torch.manual_seed(1)
    with step.NoiseOfFloat32():
        double = torch.randn_like(like.double())
    assert double.dtype == torch.float64 and torch.equal(double, single.double())


def test_a_training_step_updates_the_weights_as_the_experiment_says(drives):
    """AdamW's first step in closed form: lr against the sign of the gradient, after the decay."""
    call = compare.make_workload("step", CASES["tiny"], ("v2",), CPU, drives).build("v2", torch.float32)
    grads = correctness.compute(call, ("step",)).grads
    before = {name: call.leaves[name].detach().clone() for name in grads}
    call.reset()
    losses = call.step("step")
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
    optim = experiment("completion_v2_tiny").optim
    for name, grad in grads.items():
        clear = grad.abs() > 1e-5  # far above AdamW's epsilon
        lr = optim.lr * (optim.multipliers["temporal.offset"] if name.startswith("temporal.offset.") else 1)
        expected = before[name] * (1 - lr * optim.weight_decay) - lr * grad.sign().float()
        torch.testing.assert_close(call.leaves[name][clear], expected[clear], rtol=1e-4, atol=1e-5, msg=name)
        assert call.leaves[name].grad is None
    assert sum(int((grad.abs() > 1e-5).sum()) for grad in grads.values()) > 10_000


def test_v2_reads_half_of_the_keys(drives):
    keys = compare.make_workload("attention", SMALL, ("v2",), CPU, drives).keys
    assert keys["v1"] == keys["v1-fused"] == 6 * SMALL.moments * SMALL.cells
    assert keys["v2"] == keys["v2-eager"] == 3 * SMALL.moments * SMALL.cells


def test_the_rig_moves_between_the_moments_and_fits_the_case(drives):
    case = CASES["upstream"]
    past, now = moments(case, drives)
    assert past.timestamp < now.timestamp and past.scene == now.scene
    assert torch.dist(past.world_T_ego[0, :3, 3], now.world_T_ego[0, :3, 3]) > 0.5
    ahead = torch.tensor([1e4, 0, 1.5, 1], dtype=torch.float64)  # far down the road, seen by the front camera
    u, v, depth, _ = now.image_T_ego[0, 0] @ ahead
    assert abs(u / depth - case.image[1] / 2) < 30 and 0 < v / depth < case.image[0] / 2
    with pytest.raises(Unavailable, match="needs 3 moments"):
        moments(SMALL, [drives[0][:2]])


USERS = dict(
    multi_depth_warp=temporal,
    cross_camera_attention=attention,
    gated_fusion=planning_guided,
    trajectory_importance=planning_guided,
)


def test_while_an_implementation_runs_networks_call_its_operations_and_no_longer(drives, monkeypatch):
    called = set()

    def counted(name, function):
        def call(*arguments, **settings):
            called.add(name)
            return function(*arguments, **settings)

        return call

    eager = {name: counted(name, function) for name, function in IMPLEMENTATIONS["eager"].items()}
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", eager)
    workload = compare.make_workload("step", CASES["tiny"], ("v1", "v2"), CPU, drives)
    workload.build("v2", torch.float32).run()
    assert called == set()
    workload.build("v1", torch.float32).run()
    assert called == set(USERS)
    with pytest.raises(ZeroDivisionError), operations_of("sdpa"):
        assert not any(getattr(module, name) is getattr(kernels, name) for name, module in USERS.items())
        raise ZeroDivisionError
    assert all(getattr(module, name) is getattr(kernels, name) for name, module in USERS.items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_without_any_key_gives_zeros(implementation):
    query, key = torch.randn(2, 3, 2, 16), torch.randn(4, 5, 2, 16)
    table = torch.tensor([[-1, -1], [0, -1]])
    mask = torch.ones(4, 5, dtype=torch.bool)
    attend = operation_of(implementation, "cross_camera_attention")
    out = attend(query, key, key, table, key_mask=mask)
    assert out[0].abs().max() == 0 and out[1].abs().max() > 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_peers_of_an_operation_agree(name):
    workload = make_workload(OPERATIONS[name], "tiny", CPU)
    references = {
        group: correctness.compute(workload.build_reference(group), workload.modes) for group in workload.plain
    }
    checked = set()
    for provider in workload.timed:
        if provider == "compile":  # takes long, and is the same function
            continue
        try:
            call = workload.build(provider, torch.float32)
        except Unavailable:
            continue
        result = correctness.compute(call, workload.modes)
        for group, reference in references.items():
            error = correctness.errors(result, reference).worst
            assert (error < 1e-5) == (group == workload.groups[provider]), f"{provider}, {group}: {error:.1e}"
        checked.add(provider)
    assert {"eager", "rigfuse"} <= checked


ON_THE_CPU = r"""
#include <cmath>
#include <cstring>
#define __device__
#define __global__
struct Dim { long long x; };
static Dim blockIdx, threadIdx, blockDim;
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static void atomicAdd(float* p, float x) { *p += x; }
static float __shfl_down_sync(unsigned, float x, int) { return x; }
extern "C" void place(long long block) { blockIdx.x = block; threadIdx.x = 0; blockDim.x = 1; }
"""


def test_the_cuda_warp_computes_the_warp(tmp_path, monkeypatch):
    """The CUDA C++ source compiled for the CPU: one thread after another, a warp of one lane."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source, library = tmp_path / "warp.cpp", tmp_path / "warp.so"
    source.write_text(ON_THE_CPU + cuda_warp.SOURCE)
    command = ["g++", "-O1", "-shared", "-fPIC", "-DSTORAGE=float", "-DLANES=1", source, "-o", library]
    subprocess.run(command, check=True)
    kernels = ctypes.CDLL(library)

    def launch(kernel, tensors, sizes):
        cells, *others = sizes
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        for cell in range(cells):
            kernels.place(ctypes.c_longlong(cell))
            kernel(*pointers, ctypes.c_longlong(cells), *map(ctypes.c_int, others))

    monkeypatch.setattr(cuda_warp, "_launch", launch)
    monkeypatch.setattr(cuda_warp, "_kernels", lambda dtype: (kernels.warp_forward, kernels.warp_backward))
    inputs = OPERATIONS["multi_depth_warp"].make_inputs(
        4, 3, 5, 6, 7, 200, dtype=torch.float32, device=CPU, generator=torch.Generator().manual_seed(0)
    )
    results = []
    for function in (
        cuda_warp._CudaWarp.apply,
        lambda f, p, d, o, s: grid_sample_warp(f, p, d, offsets=o, source_index=s),
    ):
        leaves = [inputs.arguments[name].detach().requires_grad_() for name in inputs.leaves]
        arguments = {**inputs.arguments, **dict(zip(inputs.leaves, leaves))}
        warped, coverage = function(*arguments.values())
        results.append([warped, coverage, *torch.autograd.grad(warped, leaves, inputs.grad)])
    assert results[0][1].max() > 0.5 and results[0][1].min() < 0.5
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
