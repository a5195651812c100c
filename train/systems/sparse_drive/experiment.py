"""The sparse driving model as an experiment: stages 1 (detection and map) and 2 (motion and planning too)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ....modules.sparse_drive.losses import LOSS_WEIGHTS, LossConfig
from ....modules.sparse_drive.network import SparseDriveConfig
from ....modules.sparse_drive.results import ResultConfig
from ...config import Experiment
from ...metrics.detection import FIGURES
from .anchors import read_anchors
from .data import DriveBatch, DriveConfig, build_driving, collate
from .evaluate import EvaluationConfig, evaluate_driving
from .model import DrivingModel


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

    def build_model(self) -> DrivingModel:
        anchors = None
        if self.anchors and Path(self.anchors).is_file():
            anchors = read_anchors(self.anchors)
        elif self.anchors:
            raise FileNotFoundError(f"anchors is {self.anchors}: no such file; train/tools/make_anchors.py makes one")
        return DrivingModel.of(self.model, self.matching, anchors)

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
