"""One training step of the whole completion cascade, as train's configurations have it: forward, losses, backward,
optimiser; the backbone is frozen, weights and images are random."""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..modules.completion.cascade import CompletionCascade, RigWindow
from ..modules.rig import NUSCENES_CAMERAS
from ..train.data import Drive
from ..train.optim import build_optimizer
from ..train.systems import experiment
from ..train.systems.completion.experiment import CompletionExperiment
from .geometry import GEOMETRY, moments, rig_of
from .implementations import operations_of
from .stage import CAMERAS, Case, jumping
from .workload import Call, Unavailable


@dataclass(frozen=True)
class Step:
    """The seeded inputs of a case, the same for every provider."""

    settings: CompletionExperiment
    window: RigWindow  # float32 on the device
    missing: torch.Tensor  # (B, V) bool
    weights: dict[bool, dict[str, torch.Tensor]]  # of V1 and V2, and (True) of V3
    device: torch.device


@dataclass
class TrainingStep(Call):
    """`step` also updates the weights: `run` returns the weighted sum of the losses, then the losses."""

    optimizer: torch.optim.Optimizer | None = None
    clip: float = 0.0

    def step(self, mode: str) -> tuple[torch.Tensor, ...]:
        losses = self.forward()
        losses[0].backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tuple(loss.detach() for loss in losses)


class NoiseOfFloat32(TorchFunctionMode):
    """The VAE's noise in float64 with the values that it has in float32, which torch's generators draw otherwise."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn_like:
            return function(args[0].float()).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def make_step(case: Case, device: torch.device, drives: list[Drive]) -> Step:
    if not case.experiment:
        raise Unavailable("no training step at this size: none of the experiments has it")
    if rig_of(drives).names != NUSCENES_CAMERAS:
        raise Unavailable("no training step with this rig: the experiments' cascade has nuScenes' cameras")
    settings = experiment(case.experiment)
    settings.model.planning.enable = True  # V1 and V2 with all stages, as the documents have them
    settings.data.image_size = case.image
    settings.data.history = settings.model.temporal.queue_length = case.moments
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((case.batch, case.moments + 1, CAMERAS, 3, *case.image), generator=generator)
    ahead = torch.stack([torch.linspace(4, 24, settings.data.future), torch.zeros(settings.data.future)], dim=-1)
    window = RigWindow(images, moments(case, drives), ahead.expand(case.batch, -1, -1)).to(device)
    missing = torch.zeros(case.batch, CAMERAS, dtype=torch.bool)
    for sample in range(case.batch):
        missing[sample, case.missing_cameras(sample, CAMERAS)] = True
    weights = {geometry: _weights(_of_version(settings, geometry)) for geometry in (False, True)}
    return Step(settings, window, missing, weights, device)


def _of_version(settings, geometry):
    """The settings of V1 and V2, or of V3 as its experiment has them."""
    if not geometry:
        return settings
    settings, v3 = deepcopy(settings), experiment("completion_v3")
    settings.model.temporal.geometry, settings.model.temporal.depths = True, v3.model.temporal.depths
    settings.model.vae.enable, settings.model.planning.enable = v3.model.vae.enable, v3.model.planning.enable
    settings.losses, settings.optim.multipliers = v3.losses, v3.optim.multipliers
    return settings


def _weights(settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = settings.build_model()
        for parameter in model.parameters():
            if not parameter.any():  # what training starts from zero would hide everything before it from the check
                nn.init.normal_(parameter, std=1e-2)
    return model.state_dict()


def step_call(step: Step, implementation: str, topology: str, dtype: torch.dtype) -> TrainingStep:
    """The step of V1 ("global"), V2 ("neighbours") or V3 ("geometry"), on one of `IMPLEMENTATIONS`."""
    half = dtype in (torch.float16, torch.bfloat16)
    operations, settings = operations_of(implementation), _of_version(step.settings, topology == GEOMETRY)
    model = _model(step, settings, topology).to(torch.float32 if half else dtype)
    optimizer = build_optimizer(model, settings.optim)  # freezes what the experiment freezes
    window = step.window
    if dtype == torch.float64:
        window = RigWindow(window.images.double(), window.frames, window.trajectory)
    leaves = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run():
        with operations, torch.autocast(step.device.type, dtype=dtype if half else None, enabled=half):
            losses = model(window, drop=step.missing).losses
        return sum(settings.losses[name] * loss for name, loss in losses.items()), *losses.values()

    def run_in_float64():
        with NoiseOfFloat32():
            return run()

    learned = {name: buffer.clone() for name, buffer in model.temporal.named_buffers()}

    def reset():
        torch.manual_seed(0)  # of the VAE's noise
        for name, buffer in model.temporal.named_buffers():
            buffer.copy_(learned[name])

    return TrainingStep(
        run_in_float64 if dtype == torch.float64 else run,
        leaves,
        torch.ones((), dtype=torch.float32, device=step.device),  # losses are float32 in every dtype
        reset,
        capturable="the cascade chooses its maps on the CPU",
        jumps=jumping(leaves, "temporal."),
        optimizer=optimizer,
        clip=settings.optim.clip or math.inf,
    )


def _model(step: Step, settings, topology) -> CompletionCascade:
    config = deepcopy(settings.model)
    config.temporal.topology = "neighbours" if topology == GEOMETRY else topology
    model = config.build().to(step.device)
    model.trajectory_dropout = 0.0  # every sample takes all paths
    model.load_state_dict(step.weights[topology == GEOMETRY])
    return model.train()
