"""A training step of the detector, with and without frozen branches and routing: forward, losses, backward, optimiser.

Networks, settings and what is frozen are those of train's configurations; weights, images, points and boxes are random,
but as if after some training: batch norms know the statistics of the inputs, and beside each box is a query. Rounding
decides nothing: neither which query is matched nor in which voxel a point lies.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...modules.cmt_aqr.detector import CmtAqr
from ...modules.cmt_aqr.head import DETECTION_CLASSES
from ...modules.detection.batch import DetectionInput
from ...train.claims import FROZEN_MEMORY, FROZEN_SPEED, ROUTING_MEMORY, ROUTING_SPEED
from ...train.command_line import TextTable
from ...train.data import Drive
from ...train.optim import build_optimizer, set_training
from ...train.systems import experiment
from ...train.systems.cmt_aqr.experiment import DetectionExperiment
from .. import claims
from ..geometry import moments
from ..results import Table
from ..step import TrainingStep
from ..subject import Place, Plan, Subject, chosen
from ..workload import STEP, Workload

SCOPE = "step"
_SIZE = "voxel0100_r50_800x320_cbgs"
_BOXES = 30  # in a sample
_REFERENCE = "unfrozen"


@dataclass(frozen=True)
class Provider:
    experiment: str  # whose freezing and learning rates it has
    checkpoint: bool
    about: str


PROVIDERS = {
    "unfrozen": Provider(f"cmt_aqr_unfrozen_{_SIZE}", False, "everything trains"),
    "frozen": Provider(f"cmt_aqr_{_SIZE}", False, "the image backbone and the LiDAR branch up to its neck are frozen"),
    "frozen-checkpointed": Provider(f"cmt_aqr_{_SIZE}", True, "frozen, and decoder layers computed again in backward"),
    "unrouted": Provider(f"cmt_{_SIZE}", False, "frozen, without routing"),
}
GROUPS = {"unfrozen": "unfrozen", "frozen": "frozen", "frozen-checkpointed": "frozen", "unrouted": "unrouted"}


@dataclass(frozen=True)
class DetectorCase:
    """image: (height, width) pixels. reach: metres from the ego to each side of the range. points: of a sample.
    moments: of history, none. The rest is the experiment's."""

    name: str
    about: str
    experiment: str
    image: tuple[int, int]
    reach: float
    queries: int
    points: int
    batch: int
    moments: int = 0


_FULL = f"cmt_aqr_{_SIZE}"
CASES = {
    case.name: case
    for case in (
        DetectorCase("documents", "320×800, 1024×1024×40 voxels", _FULL, (320, 800), 51.2, 900, 250_000, 2),
        DetectorCase("small", "the same networks, 64×160, 256×256×40 voxels", _FULL, (64, 160), 12.8, 200, 10_000, 1),
        DetectorCase("tiny", "to try the command", f"{_FULL}_tiny", (96, 160), 38.4, 150, 3_000, 1),
    )
}


def default_cases(quick: bool, device: torch.device) -> list[str]:
    return ["tiny" if quick else "documents" if device.type == "cuda" else "small"]


class Detector(Subject):
    option = "detector"
    about = "a training step of it, branches frozen or not, with routing or not (default: all of these)"
    settings = dict(nargs="*", metavar="PROVIDER")

    def plan(self, arguments, device):
        providers = chosen("provider", arguments.detector, PROVIDERS)
        cases = chosen("case", arguments.case or default_cases(arguments.quick, device), CASES)
        return Plan(self.option, tuple(Place(SCOPE, case) for case in cases), tuple(providers))

    def make_workload(self, place, request):
        return make_workload(CASES[place.case], request.plan.providers, request.device, request.drives)

    def judge(self, request, outcome):
        return judge(outcome)

    def listing(self):
        rows = [[name, provider.about] for name, provider in PROVIDERS.items()]
        rows += [[f"--case {case.name}", case.about] for case in CASES.values()]
        return [TextTable("--detector", ["provider, case", "what it is"], 2, rows)]


SUBJECT = Detector()


def judge(outcome) -> list[claims.Judged]:
    """What the documents expect of freezing the detector's branches, and what routing may cost."""
    cases = [case for _, case in outcome.sizes]
    if not cases:
        return []
    table, judged = Table(outcome.rows), []
    for name, pair, memory, speed in (
        ("a training step with frozen branches", ("unfrozen", "frozen"), FROZEN_MEMORY, FROZEN_SPEED),
        ("a training step with routing", ("unrouted", "frozen"), ROUTING_MEMORY, ROUTING_SPEED),
    ):
        where = claims.Where(SCOPE, claims.claimed_case(cases), STEP, name, pair)
        judged += [claims.judge_memory(memory, table, where), claims.judge_speed(speed, table, where)]
    return judged


@dataclass(frozen=True)
class _Step:
    """The seeded inputs of a case, the same for every provider."""

    case: DetectorCase
    batch: DetectionInput  # float32 on the device
    weights: dict[str, torch.Tensor]
    device: torch.device


def make_workload(case: DetectorCase, timed: tuple[str, ...], device: torch.device, drives: list[Drive]) -> Workload:
    step = _make_step(case, device, drives)
    return Workload(
        subject=SUBJECT.option,
        scope=SCOPE,
        case=case.name,
        groups=GROUPS,
        plain={group: group for group in GROUPS.values()},
        timed=timed,
        build=lambda provider, dtype: _call(step, PROVIDERS[provider], dtype),
        build_reference=lambda group: _call(step, PROVIDERS[group], torch.float64),
        modes=(STEP,),
    )


def _settings(case: DetectorCase, provider: Provider) -> DetectionExperiment:
    settings, regime = experiment(case.experiment), experiment(provider.experiment)
    settings.data.point_range = _point_range(case)
    settings.data.image_size, settings.model.queries = case.image, case.queries
    for branch in ("camera", "lidar"):
        own, other = getattr(settings.model, branch), getattr(regime.model, branch)
        own.frozen_stages, own.norm_eval = other.frozen_stages, other.norm_eval
    settings.optim, aqr = regime.optim, regime.model.aqr
    settings.model.aqr.generation, settings.model.aqr.learnable_scale = aqr.generation, aqr.learnable_scale
    settings.model.grid_mask = 0.0
    settings.model.decoder.checkpoint = provider.checkpoint
    settings.model.decoder.dropout = 0.0  # it would be another one in another dtype
    return settings


def _point_range(case):
    return (-case.reach, -case.reach, -3.0, case.reach, case.reach, 5.0)


def _make_step(case, device, drives) -> _Step:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = _settings(case, PROVIDERS[_REFERENCE]).build_model()
        for parameter in model.parameters():
            if not parameter.any():  # what training starts from zero would hide everything before it from the check
                nn.init.normal_(parameter, std=1e-2)
        for task in model.task_heads.tasks.values():
            task.weight_out.data *= 0.1  # boxes are near their reference points
        batch = _make_batch(case, drives, model.reference_points.detach(), device)
        _calibrate(model.to(device).train(), batch)
    return _Step(case, batch, model.state_dict(), device)


@torch.no_grad()
def _calibrate(model: CmtAqr, batch: DetectionInput) -> None:
    """Sets the statistics of every batch norm to those of the batch; with others values would grow at every block."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over the batches so far, of which there is this one
    model(batch)


def _make_batch(case, drives, reference, device) -> DetectionInput:
    generator = torch.Generator().manual_seed(0)
    samples = range(case.batch)
    batch = DetectionInput(
        torch.randn((case.batch, 6, 3, *case.image), generator=generator),
        moments(case, drives)[0].image_T_ego,
        [_points(case, generator) for _ in samples],
        [_boxes(case, reference, generator) for _ in samples],
        [torch.randint(len(DETECTION_CLASSES), (_BOXES,), generator=generator) for _ in samples],
        [f"{index}" for index in samples],
    )
    parts = {name: [x.to(device) for x in getattr(batch, name)] for name in ("points", "boxes", "labels")}
    return replace(batch, images=batch.images.to(device), **parts)


def _points(case, generator):
    """Equally many at every distance, as a turning scanner has them, most of them on the ground."""
    distance, angle, height, where, intensity, lag = torch.rand(6, case.points, generator=generator)
    distance, angle = distance * case.reach, angle * 2 * math.pi
    z = torch.where(where < 0.7, 0.1 * height, 3 * height)
    place = torch.stack([distance * angle.cos(), distance * angle.sin(), z], dim=1)
    size = torch.tensor(experiment(case.experiment).model.lidar.voxel_size)
    inside = 0.1 + 0.8 * torch.rand(place.shape, generator=generator)
    return torch.cat([((place / size).floor() + inside) * size, torch.stack([intensity, 0.5 * lag], dim=1)], dim=1)


def _boxes(case, reference, generator):
    """About as large as cars, each half a metre beside one of the reference points (N, 3)."""
    low, high = torch.tensor(_point_range(case)).view(2, 3)
    beside = torch.randperm(len(reference), generator=generator)[:_BOXES]
    draw = torch.rand(_BOXES, 6, generator=generator)
    size = torch.tensor([4.5, 1.9, 1.6]) * (0.8 + 0.4 * draw[:, :3])
    place = low + (high - low) * reference[beside] + 0.3
    return torch.cat([place, size, 2 * math.pi * draw[:, 3:4], 10 * draw[:, 4:] - 5], dim=1)


def _call(step: _Step, provider: Provider, dtype: torch.dtype) -> TrainingStep:
    half = dtype in (torch.float16, torch.bfloat16)
    settings = _settings(step.case, provider)
    model = settings.build_model().to(step.device)
    own = model.state_dict()
    model.load_state_dict({name: weight for name, weight in step.weights.items() if name in own})
    batch = _in_float64(model, step.batch) if dtype == torch.float64 else step.batch
    optimizer = build_optimizer(model, settings.optim)  # freezes what the experiment freezes
    set_training(model)

    def run():
        with torch.autocast(step.device.type, dtype=dtype if half else None, enabled=half):
            losses = model(batch).losses
        return sum(settings.losses[name] * loss for name, loss in losses.items()), *losses.values()

    def reset():
        torch.manual_seed(0)  # of the denoising queries' noise

    return TrainingStep(
        run,
        # The heads' last. Further back gradients hang on signs that rounding turns over, or are nothing but rounding.
        {name: p for name, p in model.named_parameters() if name.endswith(".weight_out")},
        torch.ones((), device=step.device),
        reset,
        capturable="queries are matched on the CPU",
        optimizer=optimizer,
        clip=settings.optim.clip,
    )


def _in_float64(model: CmtAqr, batch: DetectionInput) -> DetectionInput:
    """Changes the model; heads and losses stay float32, as they are under autocast too."""
    model.double()
    for part in (model.task_heads, model.attention_bias_generator):
        if part is not None:
            part.float()
    return replace(batch, images=batch.images.double(), points=[points.double() for points in batch.points])
