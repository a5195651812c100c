"""The sparse driving model as an experiment: stages 1 (detection and map) and 2 (motion and planning too)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ....modules.sparse_drive.completed import CompletedDriveConfig
from ....modules.sparse_drive.losses import LOSS_WEIGHTS, LossConfig
from ....modules.sparse_drive.network import SparseDriveConfig
from ....modules.sparse_drive.results import ResultConfig
from ...config import Experiment
from ...metrics.detection import FIGURES
from .anchors import read_anchors
from .data import DriveBatch, DriveConfig, build_driving, collate
from .evaluate import GUARD, EvaluationConfig, evaluate_driving, masked_by_token
from .model import CompletedModel, DrivingModel


@dataclass
class DriveExperiment(Experiment):
    """The driving model with its data, losses and evaluation."""

    model: SparseDriveConfig = field(default_factory=SparseDriveConfig)
    anchors: str = ""  # a file of train/tools/make_anchors.py; empty = anchors that are spread evenly
    data: DriveConfig = field(default_factory=DriveConfig)
    matching: LossConfig = field(default_factory=LossConfig)
    results: ResultConfig = field(default_factory=ResultConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    losses: dict[str, float] = field(default_factory=lambda: dict(LOSS_WEIGHTS))
    metric: str = "NDS"
    metric_mode: Literal["min", "max"] = "max"

    kind: ClassVar[type] = DrivingModel

    def build_model(self) -> DrivingModel:
        model = self.kind.of(self.model, self.matching)
        if self.anchors and not Path(self.anchors).is_file():
            raise FileNotFoundError(f"anchors is {self.anchors}: no such file; train/tools/make_anchors.py makes one")
        if self.anchors:
            model.head.set_anchors(read_anchors(self.anchors))
        return model

    def figure_names(self) -> tuple[str, ...]:
        return (*FIGURES, "map/mAP", "tracking/AMOTA", "plan/L2/mean", "plan/L2/endpoint", "plan/collision/mean")

    def build_data(self):
        return build_driving(self.data, self.model, self.run.seed)

    def collate(self, items: Sequence[DriveBatch]) -> DriveBatch:
        return collate(items)

    @torch.no_grad()
    def evaluate(self, model: DrivingModel, loader) -> dict[str, float]:
        """The figures of all tasks of `evaluation.tasks` that the model has, see `evaluate_driving`."""
        return evaluate_driving(self, model, loader)

    def record_sections(self, runs, folder, options) -> list[str]:
        """See `train.record`."""
        from .record import sections  # which knows the experiments

        return sections(runs)


@dataclass
class CompletedExperiment(DriveExperiment):
    """The driving model with completion in front of its head."""

    model: CompletedDriveConfig = field(default_factory=CompletedDriveConfig)
    losses: dict[str, float] = field(
        default_factory=lambda: LOSS_WEIGHTS | dict(ssl=1.0, vae_rec=1.0, vae_kl=1e-3, planning_guided=1.0)
    )

    kind: ClassVar[type] = CompletedModel

    def figure_names(self) -> tuple[str, ...]:
        names = super().figure_names()
        return (*names, *(f"masked/{name}" for name in names), "guarded/NDS")

    def evaluate(self, model: CompletedModel, loader) -> dict[str, float]:
        """Figures with all cameras, "masked/" in front of those with the fixed losses of `masked_by_token`, and
        "guarded/NDS": that of the masked ones, NaN where the guard says no (see `EvaluationConfig`)."""
        figures = evaluate_driving(self, model, loader)
        if self.evaluation.masked:
            masked = evaluate_driving(self, model, loader, masked_by_token(self.model.dropout), measured=False)
            allowed = self._is_guarded(figures)
            figures |= {f"masked/{name}": value for name, value in masked.items()}
            figures["guarded/NDS"] = masked["NDS"] if allowed else math.nan
        return figures

    def _is_guarded(self, figures):
        """Whether the figures with all cameras are still what they were."""
        nds, l2 = self.evaluation.reference_nds, self.evaluation.reference_l2
        kept = nds is None or figures["NDS"] >= nds - GUARD["nds"]
        return kept and (l2 is None or figures.get("plan/L2/mean", math.inf) <= l2 + GUARD["l2"])
