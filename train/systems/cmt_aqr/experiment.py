"""The camera + LiDAR detector with AQR as an experiment (system C)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ....modules.backbones import untouched_norms
from ....modules.cmt_aqr.detector import CmtAqr, DetectorConfig
from ....modules.detection.batch import DetectionInput
from ....modules.detection.boxes import Detections, decode, move_boxes
from ...config import Experiment
from ...data.splits import split_names
from ...distributed import sum_over_ranks
from ...loading import TrainingError
from ...metrics.detection import FIGURES, evaluate_detection
from .data import DetectionBatch, DetectionConfig, build_detection, collate

_LOSSES = dict(cls=2.0, box=0.25, dn_cls=2.0, dn_box=0.25, dense_cls=1.0, dense_box=1.0)


@dataclass
class DetectionExperiment(Experiment):
    """The detector with its data, losses and evaluation."""

    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionConfig = field(default_factory=DetectionConfig)
    losses: dict[str, float] = field(default_factory=_LOSSES.copy)
    random_frozen: tuple[str, ...] = ()  # parts that may be frozen though nobody has trained them, e.g. img_backbone
    metric: str = "NDS"
    metric_mode: Literal["min", "max"] = "max"

    def build_model(self) -> CmtAqr:
        return self.model.build(self.data.image_size, self.data.point_range)

    def approve(self, model: CmtAqr) -> None:
        """Refuses to train on a frozen part that is random, unless `random_frozen` names it."""
        parts = [name for name, part in model.named_children() if _frozen(part) and untouched_norms(part)]
        refused = [name for name in parts if name not in self.random_frozen]
        if refused:
            remedy = "give them weights (--weights CHECKPOINT, or model.camera.weights for the ResNet)"
            named = f"or say that you mean it: --cfg-options random_frozen={','.join(parts)}"
            raise TrainingError(f"frozen, and as random as they were made: {', '.join(refused)}; {remedy}, {named}")

    def remarks(self, model: CmtAqr) -> list[str]:
        return [f"frozen and random, as random_frozen allows: {name}" for name in self.random_frozen]

    def figure_names(self) -> tuple[str, ...]:
        return FIGURES

    def build_data(self):
        return build_detection(self.data, self.run.seed)

    def collate(self, items: Sequence[DetectionBatch]) -> DetectionBatch:
        return collate(items)

    def evaluate(self, model: CmtAqr, loader) -> dict[str, float]:
        """Computes the official figures, see `evaluate_detection`; with AQR its scale and its mean |weight| by modality
        too."""
        found, sums = {}, torch.zeros(3, dtype=torch.float64)  # Σ |camera|, Σ |LiDAR|, samples
        for batch in loader:
            output = model(batch)
            found |= zip(batch.tokens, in_ego(decode(output.predictions), batch))
            if output.weights is not None:
                sums += torch.tensor([*output.weights.abs().mean(dim=1).sum(dim=0).tolist(), len(batch.tokens)])
        split = split_names(self.data)[1]
        figures = evaluate_detection(found, self.data.root, self.data.version, split)
        if self.model.aqr.generation == "none":
            return figures
        camera, lidar, samples = sum_over_ranks(sums).tolist()
        figures |= {"aqr/weight_camera": camera / samples, "aqr/weight_lidar": lidar / samples}
        if self.model.aqr.generation == "v3":
            figures["aqr/bias_scale"] = model.attention_bias_generator.bias_scale.item()
        return figures

    def record_sections(self, runs, folder, options) -> list[str]:
        """See `train.record`."""
        from .record import sections  # which knows the experiments

        return sections(runs, folder, options)


def in_ego(detections: list[Detections], batch: DetectionInput) -> list[Detections]:
    """Detections of the samples of a batch, from the frame of its data into the reference ego frame."""
    if batch.ego_T_frame is None:
        return detections
    return [
        Detections(move_boxes(found.boxes, ego_T_frame), found.scores, found.labels)
        for found, ego_T_frame in zip(detections, batch.ego_T_frame)
    ]


def _frozen(part) -> bool:
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
