"""The comparison of V1 with V2: four corners, topology × implementation, on the attention alone, on stage 1, and on a
training step of the whole cascade."""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from ...kernels import cross_camera_attention
from ...modules.completion.temporal import MotionCompensatedTemporalCompletion, plan_attention
from ...modules.history import HistoryFrame
from ...modules.rig import NUSCENES_CAMERAS, RigFrame
from ...modules.topology import Topology
from ...train.data import Drive
from ..cases import CAMERAS, Case
from ..eager import EagerTemporalCompletion, eager_attention
from ..floors import traffic_floor
from ..geometry import moments
from ..step import make_step, step_call
from ..workload import STEP, Call, Workload

SUBJECT = "compare"
SCOPES = dict(
    attention="the attention alone: queries, keys and values in, attended values out",
    temporal="stage 1: warp, attention, decode, fuse",
    step="one training step of the whole cascade; memory above the weights, the optimiser's state and the images",
)
_REFERENCE_QUERIES = 512


@dataclass(frozen=True)
class Provider:
    topology: str
    fused: bool
    about: str


PROVIDERS = {
    "v1": Provider("global", False, "the documents' V1 in plain eager PyTorch, all 6 cameras"),
    "v2": Provider("neighbours", True, "V2 on this toolkit's operations, 3 cameras"),
    "v1-fused": Provider("global", True, "V1 on this toolkit's operations"),
    "v2-eager": Provider("neighbours", False, "V2 in plain eager PyTorch"),
}
GROUPS = {name: provider.topology for name, provider in PROVIDERS.items()}
PLAIN = {"global": "v1", "neighbours": "v2-eager"}


class ReferenceTemporalCompletion(EagerTemporalCompletion):
    """The eager formulation with queries in slices, so that float64 scores of a large case fit."""

    def _attend(self, *arguments):
        return reference_attention(*arguments)


def reference_attention(query, *others):
    slices = query.split(_REFERENCE_QUERIES, dim=1)
    return torch.cat([checkpoint(eager_attention, part, *others, use_reentrant=False) for part in slices], dim=1)


@dataclass(frozen=True)
class Problem:
    """The seeded inputs of a case, the same for every provider. `history` is in temporal order."""

    case: Case
    features: torch.Tensor  # (B, V, C, H, W) float32 on the device
    history: list[torch.Tensor]
    missing: torch.Tensor  # (B, V) bool on the CPU: who is missing decides what is launched
    frames: list[RigFrame]  # of the history, then of the present
    weights: dict[str, torch.Tensor]
    grad: torch.Tensor
    device: torch.device


def make_problem(case: Case, device: torch.device, drives: list[Drive]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, CAMERAS, case.channels, *case.size)

    def maps():
        flat = torch.randn((shape[0] * shape[1], *shape[2:]), generator=generator)
        return flat.to(device, memory_format=torch.channels_last).unflatten(0, shape[:2])

    missing = torch.zeros(shape[:2], dtype=torch.bool)
    for sample in range(case.batch):
        missing[sample, case.missing_cameras(sample)] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _module(MotionCompensatedTemporalCompletion, case, "global")
        for parameter in module.parameters():
            if not parameter.any():  # what training starts from zero would hide everything before it from the check
                torch.nn.init.normal_(parameter, std=1e-2)
    history = [maps() for _ in range(case.moments)]
    frames = moments(case, drives)
    return Problem(case, maps(), history, missing, frames, module.state_dict(), maps(), device)


def _module(kind, case, topology):
    return kind(
        case.channels,
        topology=topology,
        heads=case.heads,
        depths=case.depths,
        queue_length=case.moments,
        kv_downsample=case.kv_downsample,
        stride=case.stride,
    )


def _temporal_call(problem: Problem, kind, topology: str, dtype: torch.dtype) -> Call:
    """Weights stay float32 under autocast in a half-precision run, as in training; float64 is float64 throughout."""
    half = dtype in (torch.float16, torch.bfloat16)
    module = _module(kind, problem.case, topology).to(problem.device, torch.float32 if half else dtype)
    module.load_state_dict(problem.weights)
    features = problem.features.to(dtype).requires_grad_()
    history = [past.to(dtype) for past in problem.history]
    available = torch.zeros_like(problem.missing)
    *past_frames, present = problem.frames

    def reset():
        module.reset_history()
        for past, frame in zip(history, past_frames):
            module.history.push(past, available, frame)

    def run():
        with torch.autocast(problem.device.type, dtype=dtype if half else None, enabled=half):
            return module(features, problem.missing, present)

    leaves = dict(features=features, **dict(module.named_parameters()))
    why_not = "stage 1 chooses its maps on the CPU"
    jumps = frozenset(name for name in leaves if name.startswith("offset."))
    return Call(run, leaves, problem.grad.to(dtype), reset, capturable=why_not, jumps=jumps)


def _block_table(problem: Problem, topology: str) -> torch.Tensor:
    """(Nq, M) into the T·B·V camera frames of the history; −1 = none."""
    past = reversed(list(zip(problem.history, problem.frames)))
    history = [HistoryFrame(features, ~torch.zeros_like(problem.missing), frame) for features, frame in past]
    plan = plan_attention(problem.missing, history, Topology.named(topology).table(NUSCENES_CAMERAS))
    numbers = torch.cat([t * problem.missing.numel() + maps for t, maps in enumerate(plan.maps)])
    return torch.where(plan.block_table >= 0, numbers[plan.block_table.clamp(min=0)], -1)


def attention_inputs(problem: Problem, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """query, key, value and key_mask of the attention alone, and the gradient of its output."""
    case = problem.case
    generator = torch.Generator().manual_seed(1)
    height, width = (-(-n // case.kv_downsample) for n in case.size)
    queries, blocks = int(problem.missing.sum()), case.moments * problem.missing.numel()
    query_shape = (queries, case.cells, case.heads, case.channels // case.heads)
    key_shape = (blocks, height * width, *query_shape[2:])
    query, key, value, grad = (
        torch.randn(shape, generator=generator).to(problem.device, dtype)
        for shape in (query_shape, key_shape, key_shape, query_shape)
    )
    covered = torch.rand(key_shape[:2], generator=generator) < 0.9
    leaves = {name: t.requires_grad_() for name, t in dict(query=query, key=key, value=value).items()}
    return dict(**leaves, key_mask=covered.to(problem.device)), grad


def _attention_call(problem: Problem, function, topology: str, dtype: torch.dtype) -> Call:
    inputs, grad = attention_inputs(problem, dtype)
    key_mask = inputs.pop("key_mask")
    table = _block_table(problem, topology).to(problem.device)
    return Call(lambda: function(*inputs.values(), table, key_mask), inputs, grad)


def _fused_attention(query, key, value, table, key_mask):
    return cross_camera_attention(query, key, value, table, key_mask=key_mask)


def _attention_floor(problem: Problem, topology: str, dtype: torch.dtype):
    """Queries, the keys and values that the table lists, and the result, each moved once; two matrix products."""
    inputs, grad = attention_inputs(problem, dtype)
    table = _block_table(problem, topology)
    used = table[table >= 0].unique().numel()
    moved = [inputs["query"], inputs["key"][:used], inputs["value"][:used]]
    listed_keys = int((table >= 0).sum()) * inputs["key"].shape[1]
    flops = 4 * problem.case.cells * listed_keys * problem.case.channels
    return traffic_floor(moved, [grad], moved, flops)


def make_workload(
    scope: str, case: Case, timed: tuple[str, ...], device: torch.device, drives: list[Drive]
) -> Workload:
    if scope == "step":
        return _step_workload(case, timed, device, drives)
    problem = make_problem(case, device, drives)
    if scope == "attention":
        make, kinds, reference = _attention_call, (eager_attention, _fused_attention), reference_attention
    else:
        kinds = (EagerTemporalCompletion, MotionCompensatedTemporalCompletion)
        make, reference = _temporal_call, ReferenceTemporalCompletion

    def floor(provider, dtype):
        return _attention_floor(problem, GROUPS[provider], dtype)

    def build(provider, dtype):
        return make(problem, kinds[PROVIDERS[provider].fused], PROVIDERS[provider].topology, dtype)

    tables = {topology: _block_table(problem, topology) for topology in PLAIN}
    listed = {topology: int((table >= 0).sum()) // len(table) for topology, table in tables.items()}
    return Workload(
        subject=SUBJECT,
        scope=scope,
        case=case.name,
        groups=GROUPS,
        plain=PLAIN,
        timed=timed,
        build=build,
        build_reference=lambda group: make(problem, reference, group, torch.float64),
        floor=floor if scope == "attention" else None,
        sizes=case.sizes,
        keys={provider: listed[topology] * case.cells for provider, topology in GROUPS.items()},
    )


def _step_workload(case, timed, device, drives) -> Workload:
    step = make_step(case, device, drives)
    plain = (EagerTemporalCompletion, eager_attention)

    def build(provider, dtype):
        return step_call(step, PROVIDERS[provider].topology, dtype, None if PROVIDERS[provider].fused else plain)

    return Workload(
        subject=SUBJECT,
        scope="step",
        case=case.name,
        groups=GROUPS,
        plain=PLAIN,
        timed=timed,
        build=build,
        build_reference=lambda group: step_call(
            step, group, torch.float64, (ReferenceTemporalCompletion, reference_attention)
        ),
        sizes=case.sizes,
        modes=(STEP,),
    )
