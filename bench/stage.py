"""Stage 1 of a case, and the attention in it, alone: seeded inputs, and the calls that compute on them."""

from dataclasses import dataclass

import torch

from ..modules.completion.stage import TemporalConfig
from ..modules.completion.temporal import MotionCompensatedTemporalCompletion, plan_attention
from ..modules.completion.temporal_v3 import MotionCompensatedTemporalCompletionV3
from ..modules.history import HistoryFrame
from ..modules.rig import NUSCENES_CAMERAS, Rig, RigFrame
from ..train.data import Drive
from ..train.systems import experiment
from .floors import traffic_floor
from .geometry import GEOMETRY, moments, rig_of, topology_of
from .implementations import operation_of, operations_of
from .workload import Call, Floor

CAMERAS = len(NUSCENES_CAMERAS)


@dataclass(frozen=True)
class Case:
    """One problem size of stage 1, or of a training step of the whole cascade.

    image: (height, width) pixels. stride: pixels per feature cell. moments: T, moments of history. missing: cameras
    that are absent now, of the first sample, counted in a rig of six; sample b misses those b places further in the
    rig's order.
    quick: belongs to `--quick`. heavy: takes long on a CPU, or tens of GB; by default on a GPU only. default: measured
    without being named. experiment: of train/configs, whose networks a training step at this size has ("" = none); in
    that scope stride, channels, heads and so on are the experiment's.
    """

    name: str
    about: str
    image: tuple[int, int] = (900, 1600)
    stride: int = 32
    channels: int = 256
    heads: int = 8
    kv_downsample: int = 4
    depths: tuple[float, ...] = (10.0, 30.0)
    moments: int = 1
    batch: int = 1
    missing: tuple[int, ...] = (0,)
    quick: bool = False
    heavy: bool = False
    default: bool = True
    experiment: str = "completion_v2"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of a feature map."""
        return self.image[0] // self.stride, self.image[1] // self.stride

    @property
    def cells(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def work(self) -> float:
        """About how long the case takes beside others: what V1 stores, in millions of scores and of warped values."""
        queries, keys = self.batch * len(self.missing) * self.cells, self.moments * CAMERAS * self.cells
        scores = self.heads * queries * keys / self.kv_downsample**2
        return (scores + self.batch * keys * self.channels * len(self.depths)) / 1e6

    def missing_cameras(self, sample: int, cameras: int) -> list[int]:
        return [(camera * cameras // CAMERAS + sample) % cameras for camera in self.missing]

    @property
    def sizes(self) -> dict[str, int]:
        """The axis along which this case can be plotted; the smallest member of every family is `documents`."""
        documents = dict(cells=1400, moments=1, batch=1, missing=1)
        own = dict(cells=self.cells, moments=self.moments, batch=self.batch, missing=len(self.missing))
        differing = [name for name in own if own[name] != documents[name]]
        return own if not differing else {differing[0]: own[differing[0]]} if len(differing) == 1 else {}


@dataclass(frozen=True)
class Problem:
    """The seeded inputs of a case, the same for every provider. `history` is in temporal order."""

    case: Case
    rig: Rig
    features: torch.Tensor  # (B, V, C, H, W) float32 on the device
    history: list[torch.Tensor]
    missing: torch.Tensor  # (B, V) bool on the CPU: who is missing decides what is launched
    frames: list[RigFrame]  # of the history, then of the present
    weights: dict[bool, dict[str, torch.Tensor]]  # of V1 and V2, and (True) of V3
    grad: torch.Tensor
    device: torch.device


def make_problem(case: Case, device: torch.device, drives: list[Drive]) -> Problem:
    generator, rig = torch.Generator().manual_seed(0), rig_of(drives)
    shape = (case.batch, len(rig.cameras), case.channels, *case.size)

    def maps():
        flat = torch.randn((shape[0] * shape[1], *shape[2:]), generator=generator)
        return flat.to(device, memory_format=torch.channels_last).unflatten(0, shape[:2])

    missing = torch.zeros(shape[:2], dtype=torch.bool)
    for sample in range(case.batch):
        missing[sample, case.missing_cameras(sample, shape[1])] = True
    weights = {topology == GEOMETRY: _weights(case, rig, topology) for topology in ("global", GEOMETRY)}
    history = [maps() for _ in range(case.moments)]
    frames = moments(case, drives)
    return Problem(case, rig, maps(), history, missing, frames, weights, maps(), device)


def _weights(case, rig, topology):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _module(case, rig, topology)
        for parameter in module.parameters():
            if not parameter.any():  # what training starts from zero would hide everything before it from the check
                torch.nn.init.normal_(parameter, std=1e-2)
        if topology == GEOMETRY:
            torch.nn.init.normal_(module.usual.means)
    return module.state_dict()


def _module(case, rig, topology):
    config = TemporalConfig(
        heads=case.heads,
        depths=case.depths,
        queue_length=case.moments,
        kv_downsample=case.kv_downsample,
        stride=case.stride,
    )
    settings = dict(cameras=rig.names, topology=topology_of(topology, rig))
    if topology == GEOMETRY:  # in evaluation, or each call would change what a camera usually sees
        config.depths = experiment("completion_v3").model.temporal.depths
        return MotionCompensatedTemporalCompletionV3(case.channels, (case.stride,), config, **settings).eval()
    return MotionCompensatedTemporalCompletion(case.channels, config, **settings)


def temporal_call(problem: Problem, implementation: str, topology: str, dtype: torch.dtype) -> Call:
    """Stage 1: warp, attention, decode, fuse. Weights stay float32 under autocast in a half-precision run, as in
    training; float64 is float64 throughout."""
    half = dtype in (torch.float16, torch.bfloat16)
    module = _module(problem.case, problem.rig, topology).to(problem.device, torch.float32 if half else dtype)
    module.load_state_dict(problem.weights[topology == GEOMETRY])
    features = problem.features.to(dtype).requires_grad_()
    history = [past.to(dtype) for past in problem.history]
    available = torch.zeros_like(problem.missing)
    *past_frames, present = problem.frames
    operations = operations_of(implementation)

    def reset():
        module.reset_history()
        for past, frame in zip(history, past_frames):
            module.history.push([past] if module.every_scale else past, available, frame)

    def run():
        with operations, torch.autocast(problem.device.type, dtype=dtype if half else None, enabled=half):
            if module.every_scale:
                return module([features], problem.missing, present)[0]
            return module(features, problem.missing, present)

    leaves = dict(features=features, **dict(module.named_parameters()))
    why_not = "stage 1 chooses its maps on the CPU"
    return Call(run, leaves, problem.grad.to(dtype), reset, capturable=why_not, jumps=jumping(leaves))


def block_table(problem: Problem, topology: str) -> torch.Tensor:
    """(Nq, M) into the T·B·V camera frames of the history; −1 = none."""
    past = reversed(list(zip(problem.history, problem.frames)))
    history = [HistoryFrame(features, ~torch.zeros_like(problem.missing), frame) for features, frame in past]
    plan = plan_attention(problem.missing, history, topology_of(topology, problem.rig).table(problem.rig.names))
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


def attention_call(problem: Problem, implementation: str, topology: str, dtype: torch.dtype) -> Call:
    """The attention alone: queries, keys and values in, attended values out."""
    inputs, grad = attention_inputs(problem, dtype)
    key_mask = inputs.pop("key_mask")
    table = block_table(problem, topology).to(problem.device)
    attend = operation_of(implementation, "cross_camera_attention")
    return Call(lambda: attend(*inputs.values(), table, key_mask=key_mask), inputs, grad)


def attention_floor(problem: Problem, topology: str, dtype: torch.dtype) -> Floor:
    """Queries, the keys and values that the table lists, and the result, each moved once; two matrix products."""
    inputs, grad = attention_inputs(problem, dtype)
    table = block_table(problem, topology)
    used = table[table >= 0].unique().numel()
    moved = [inputs["query"], inputs["key"][:used], inputs["value"][:used]]
    listed_keys = int((table >= 0).sum()) * inputs["key"].shape[1]
    flops = 4 * problem.case.cells * listed_keys * problem.case.channels
    return traffic_floor(moved, [grad], moved, flops)


def jumping(leaves, prefix: str = "") -> frozenset[str]:
    """The names of what a warp's learned offsets are formed from: their layer and, of the cells, camera and place."""
    offsets = {name for name in leaves if name.startswith(f"{prefix}offset.")}
    encoding = {name for name in leaves if offsets and name.startswith(f"{prefix}attention.encoding.")}
    return frozenset(offsets | encoding)
