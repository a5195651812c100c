"""Depth of every cell, from images, with LiDAR as the truth: trains a backbone that other systems take."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
import torch.distributed as dist

from ....modules.depth.network import DepthConfig, DepthNetwork
from ....modules.settings import Count
from ...config import Experiment
from ...distributed import sum_over_ranks
from .data import DepthBatch, DepthDataConfig, build_depth, collate, known_means

METHODS = ("network", "untrained", "row", "cell")


@dataclass
class DepthExperiment(Experiment):
    """The network with its data, loss and evaluation."""

    model: DepthConfig = field(default_factory=DepthConfig)
    data: DepthDataConfig = field(default_factory=DepthDataConfig)
    losses: dict[str, float] = field(default_factory=lambda: dict(depth=1.0, objects=1.0))
    metric: str = "abs_rel"
    constant_samples: Count = 256  # training samples whose mean is the constant that depth is judged by

    def build_model(self) -> DepthNetwork:
        return self.model.build()

    def build_data(self):
        return build_depth(self.data, self.run.seed, self.model.backbone.strides, self.model.classes)

    def collate(self, items: Sequence[DepthBatch]) -> DepthBatch:
        return collate(items)

    def figure_names(self) -> tuple[str, ...]:
        by_stride = (f"abs_rel/{stride}" for stride in self.model.backbone.strides)
        objects = ("objects/iou",) if self.model.classes else ()
        return ("abs_rel", "within_25", *(f"abs_rel_{method}" for method in METHODS[1:]), *by_stride, *objects)

    def evaluate(self, model: DepthNetwork, loader) -> dict[str, float]:
        """Measures the depth of every cell in which a point lies, between the network's nearest and farthest.

        `abs_rel` is the mean of |said − true| / true, `within_25` the share of the cells where the larger of both is
        less than 1.25 times the other, means over the scales; `objects/iou` the intersection of the cells that have a
        class and those that are said to over their union, the mean over the classes and scales. Rivals:
        `abs_rel_untrained`, the same network with random weights; `abs_rel_row` and `abs_rel_cell`, the geometric mean
        of the training samples by camera and row, and by camera and cell, which see nothing of the image.
        """
        device = next(model.parameters()).device
        rows, cells = self._constants(device)
        untrained = self._untrained(device)
        strides = self.model.backbone.strides
        sums = torch.zeros(len(METHODS), len(strides), 3, dtype=torch.float64, device=device)
        objects = torch.zeros(len(strides), len(self.model.classes), 2, dtype=torch.float64, device=device)
        for batch in loader:
            output = model(batch)
            for level, (found, true) in enumerate(zip(output.labels, batch.labels)):
                objects[level] += _overlap(found, true, len(self.model.classes))
            said = dict(network=output.depths, untrained=untrained(batch).depths, row=rows, cell=cells)
            for i, method in enumerate(METHODS):
                for level, (depth, true) in enumerate(zip(said[method], batch.depths)):
                    sums[i, level] += _errors(depth.expand_as(true), true, model.usable(true))
        sums = sum_over_ranks(sums)
        abs_rel, within = (sums[..., :2] / sums[..., 2:]).unbind(-1)
        figures = dict(abs_rel=fmean(abs_rel[0].tolist()), within_25=fmean(within[0].tolist()))
        figures |= {f"abs_rel_{method}": fmean(abs_rel[i].tolist()) for i, method in enumerate(METHODS) if i}
        figures |= {f"abs_rel/{stride}": value for stride, value in zip(strides, abs_rel[0].tolist())}
        if self.model.classes:
            both, either = sum_over_ranks(objects).unbind(-1)
            figures["objects/iou"] = float((both / either)[either > 0].mean())
        return figures

    def _untrained(self, device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.seed)
            config = replace(self.model, backbone=replace(self.model.backbone, weights=None))
            return config.build().to(device).eval()

    def _constants(self, device):
        """What sees nothing: for each stride the mean by row and the mean by cell, (V, h, w) metres, over all ranks."""
        if not hasattr(self, "_measured"):
            training = self.build_data()[0]
            step = -(-len(training) // self.constant_samples)
            rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            places = range(0, len(training), step)[rank::ranks] or range(1)  # no rank may stay away from the sum
            sums, counts = ([sum_over_ranks(x.to(device)) for x in part] for part in known_means(training, places))
            self._measured = _filled(sums, counts)
        return self._measured


def _filled(sums, counts):
    """Means by row and by cell; a cell, row or camera that no point ever met has the mean of what surrounds it."""
    rows, cells = [], []
    for logs, count in zip(sums, counts):
        mean = (logs.sum() / count.sum().clamp(min=1)).expand(len(logs), 1, 1)
        for axes in ((1, 2), (2,), ()):  # by camera, by row, by cell
            total, number = (x.sum(axes, keepdim=True) if axes else x for x in (logs, count))
            before, mean = mean, torch.where(number > 0, total / number.clamp(min=1), mean)
        rows.append(before.expand_as(logs).exp().float())
        cells.append(mean.exp().float())
    return rows, cells


def _overlap(found, true, classes):
    """(classes, 2) float64: cells of both, and of either, among those in which a point lies."""
    known = true > -2
    labels = torch.arange(classes, device=true.device)[:, None]
    found, true = found[known] == labels, true[known] == labels
    return torch.stack([(found & true).sum(1), (found | true).sum(1)], dim=1).double()


def _errors(said, true, known):
    """(Σ |said − true| / true, cells within 25 %, cells) float64 over the cells that are known."""
    said, true = said[known].double(), true[known].double()
    within = torch.maximum(said / true, true / said) < 1.25
    return torch.stack([((said - true).abs() / true).sum(), within.double().sum(), known.sum().double()])
