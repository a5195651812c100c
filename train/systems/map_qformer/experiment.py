"""Map detection as an experiment: the network with its losses, its data, map AP as the figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from ....modules.camera_dropout import DropoutConfig, RandCamMask
from ....modules.map_qformer.decoder import MapOutput
from ....modules.map_qformer.language import FrozenLanguageModel
from ....modules.map_qformer.losses import LOSS_WEIGHTS, map_losses
from ....modules.map_qformer.network import MapQFormer, MapQFormerConfig
from ...config import Experiment
from ...metrics.map import HARD_THRESHOLDS, MapMetric
from ...metrics.pooling import known
from .anchors import read_anchors
from .data import MapBatch, MapDataConfig, build_maps, collate


@dataclass
class TrainingOutput:
    losses: dict[str, torch.Tensor]  # unweighted scalars
    output: MapOutput


class MapModel(MapQFormer):
    """`MapQFormer` that takes batches; in training, cameras may go missing."""

    def __init__(self, config: MapQFormerConfig, dropout: DropoutConfig):
        super().__init__(config)
        self.dropout = RandCamMask(dropout, cameras=config.images.cameras)

    def forward(self, batch: MapBatch) -> TrainingOutput:
        """The losses of a batch on the model's device."""
        missing = self.dropout.faults(len(batch.tokens), 1)[:, -1]
        missing = missing.to(batch.images.device) if missing.any() else None
        output = self.find(batch, missing)
        return TrainingOutput(map_losses(output, batch.truth, self.config.line_range).total, output)

    def find(self, batch: MapBatch, missing: torch.Tensor | None = None) -> MapOutput:
        """The lines of a batch; missing (B, V) bool."""
        return super().forward(batch.images, batch.frame, missing)


@dataclass
class MapExperiment(Experiment):
    """Map detection with its data, losses and evaluation."""

    model: MapQFormerConfig = field(default_factory=MapQFormerConfig)
    anchors: str = ""  # a file of generate_gt_cache.py --anchors; empty = straight lines, spread evenly
    dropout: DropoutConfig = field(default_factory=lambda: DropoutConfig(p_missing=0.0))
    data: MapDataConfig = field(default_factory=MapDataConfig)
    losses: dict[str, float] = field(default_factory=lambda: dict(LOSS_WEIGHTS))
    metric: str = "mAP"
    metric_mode: Literal["min", "max"] = "max"

    # The documents' names of the rates, and the groups that have them.
    rates: ClassVar[dict[str, str]] = {"q": "qformer", "m": "queries", "d": "decoder"}

    def build_model(self) -> MapModel:
        model = MapModel(self.model, self.dropout)
        if self.anchors:
            model.decoder.set_anchors(read_anchors(self.anchors))
        if self.model.lm.shard and dist.is_initialized() and isinstance(model.language, FrozenLanguageModel):
            model.language.shard("cuda" if torch.cuda.is_available() else "cpu")
        return model

    def build_data(self):
        return build_maps(self.data, self.model, self.run.seed)

    def collate(self, items: Sequence[MapBatch]) -> MapBatch:
        return collate(items)

    def figure_names(self) -> tuple[str, ...]:
        return ("mAP", "hard/mAP", *(f"AP/{name}" for name in self.model.classes))

    def remarks(self, model: MapModel) -> list[str]:
        """What the language model is."""
        if not isinstance(model.language, FrozenLanguageModel):
            return ["no language model: queries attend to the scene in one layer that is trained"]
        count = sum(weight.numel() for weight in model.language.model.parameters())
        return [f"language model {self.model.lm.source}: {count:,} parameters, frozen, {model.language.model.dtype}"]

    def lines(self, figures: Mapping[str, float]) -> list[str]:
        """The documents' line of learning rates."""
        rates = {short: figures.get(f"lr/{name}", figures.get("lr/base")) for short, name in self.rates.items()}
        return ["LR: " + " ".join(f"{short}={rate:.2e}" for short, rate in rates.items() if rate is not None)]

    @torch.no_grad()
    def evaluate(self, model: MapModel, loader) -> dict[str, float]:
        """mAP, AP/CLASS and AP/CLASS@THRESHOLD at 0.5, 1.0, 1.5 m, and "hard/…" at 0.2, 0.5, 1.0 m; classes without
        truth are left out."""
        metric = MapMetric(self.model.classes)
        for batch in loader:
            output = model.find(batch)
            for index, token in enumerate(batch.tokens):
                add(metric, token, *lines_of(output, index), batch, index)
        return figures_of(metric)


def lines_of(output: MapOutput, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the last round says of one sample: lines (instances, points, 2) metres, labels and scores (instances,), each
    instance as its likeliest class; on the CPU."""
    scores, labels = output.logits[-1, index].sigmoid().max(-1)
    return output.points[-1, index].cpu(), labels.cpu(), scores.float().cpu()


def add(metric: MapMetric, token: str, lines, labels, scores, batch: MapBatch, index: int) -> None:
    """Adds one sample of a batch with what was found in it."""
    true, true_labels = batch.truth.lines[index][:, 0].cpu(), batch.truth.labels[index].cpu()
    metric.add(token, lines, labels, scores, true, true_labels)


def figures_of(metric: MapMetric) -> dict[str, float]:
    """The figures of all ranks' samples that exist."""
    figures = known(metric.compute_over_ranks())
    hard = known(_Hard(metric).compute_over_ranks())
    return figures | {f"hard/{name}": value for name, value in hard.items()}


class _Hard(MapMetric):
    """The same samples at the harder thresholds."""

    def __init__(self, metric: MapMetric):
        super().__init__(**metric.settings)
        self.samples = metric.samples

    def compute(self):
        return super().compute(HARD_THRESHOLDS)
