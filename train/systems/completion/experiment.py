"""The completion cascade as an experiment (system A up to the features; a driving head comes on top of them)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

import torch

from ....modules.backbones import RESNET50, RESNET_TINY, ResNetFPN
from ....modules.camera_dropout import RandCamMask
from ....modules.completion.cascade import CompletionCascade
from ....modules.completion.planning_guided import PlanningGuidedCompletion
from ....modules.completion.temporal import MotionCompensatedTemporalCompletion
from ....modules.completion.vae import PVReconVAE
from ...config import Experiment
from ...data.windows import WindowBatch, WindowConfig, build_windows, collate
from .evaluate import Scenario, evaluate_completion

_RESNETS = {"resnet50": RESNET50, "tiny": RESNET_TINY}


@dataclass
class BackboneConfig:
    resnet: Literal["resnet50", "tiny"] = "resnet50"
    strides: tuple[int, ...] = (8, 16, 32, 64)
    weights: str | None = None  # a local folder or a hub name; None = random
    frozen_stages: int = 4
    norm_eval: bool = True


@dataclass
class DropoutConfig:
    p_missing: float = 0.6
    n_min: int = 1
    n_max: int = 2


@dataclass
class TemporalConfig:
    enable: bool = True
    topology: Literal["global", "neighbours", "own"] = "neighbours"
    heads: int = 8
    depths: tuple[float, ...] = (10.0, 30.0)
    queue_length: int = 4
    kv_downsample: int = 4
    stride: int = 32
    max_offset: float = 2.0
    max_gap: float = 2.0
    history_dtype: Literal["float32", "float16", "bfloat16"] | None = None


@dataclass
class VAEConfig:
    enable: bool = True
    latent: int = 64


@dataclass
class PlanningConfig:
    enable: bool = True
    topology: Literal["global", "neighbours"] = "global"
    heads: int = 8
    kv_downsample: int = 4
    sigma: float = 64.0  # pixels


@dataclass
class CascadeConfig:
    channels: int = 256
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    def build(self) -> CompletionCascade:
        backbone = dict(vars(self.backbone))
        resnet, strides = _RESNETS[backbone.pop("resnet")], self.backbone.strides
        temporal = vae = planning = None
        if self.temporal.enable:
            settings = dict(vars(self.temporal))
            if self.temporal.history_dtype:
                settings["history_dtype"] = getattr(torch, self.temporal.history_dtype)
            temporal = MotionCompensatedTemporalCompletion(self.channels, **settings)
        if self.vae.enable:
            vae = PVReconVAE(len(strides), self.channels, self.vae.latent)
        if self.planning.enable:
            settings = {name: value for name, value in vars(self.planning).items() if name != "enable"}
            planning = PlanningGuidedCompletion(strides, self.channels, **settings)
        cascade = CompletionCascade(
            ResNetFPN(resnet, channels=self.channels, **backbone),
            RandCamMask(**vars(self.dropout)),
            temporal,
            vae,
            planning,
        )
        return cascade.to(memory_format=torch.channels_last)  # that of the maps, and so of the weights' gradients


@dataclass
class CompletionExperiment(Experiment):
    model: CascadeConfig = field(default_factory=CascadeConfig)
    data: WindowConfig = field(default_factory=WindowConfig)
    losses: dict[str, float] = field(
        default_factory=lambda: dict(ssl=1.0, vae_rec=1.0, vae_kl=0.001, planning_guided=0.5)
    )
    metric: str = "relative_l2"
    evaluate_without: tuple[str, ...] = ("CAM_FRONT", "CAM_BACK_LEFT")  # cameras that are dropped, one after another

    def build_model(self) -> CompletionCascade:
        return self.model.build()

    def build_data(self):
        return build_windows(self.data, self.run.seed)

    def collate(self, items: Sequence[WindowBatch]) -> WindowBatch:
        return collate(items)

    def evaluate(self, model: CompletionCascade, loader) -> dict[str, float]:
        """How far completed features are from the true ones, each camera of `evaluate_without` dropped in turn.

        `relative_l2`: ‖completed − true‖ / ‖true‖ over the absent camera's cells, mean over cameras and scales;
        `relative_l2/CAMERA` by camera; `relative_l2_none` and `relative_l2_warp` for what the backbone makes of a black
        image, and for the camera's own past moved to the present (see `evaluate`).
        """
        which = [Scenario(camera, (camera,)) for camera in self.evaluate_without]
        scores = evaluate_completion(model, loader, which, self.model.temporal.depths)

        def mean(method, cameras=self.evaluate_without):
            return fmean(s.relative_l2 for s in scores if s.method == method and s.scenario in cameras)

        means = dict(relative_l2=mean("completed"), relative_l2_none=mean("none"), relative_l2_warp=mean("warp"))
        return means | {f"relative_l2/{camera}": mean("completed", (camera,)) for camera in self.evaluate_without}
