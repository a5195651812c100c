"""Figures of static BEV over a split, streamed scene by scene: series of lanes, IoU, instances, beside a constant."""

from dataclasses import dataclass
from typing import Literal

import torch

from ....modules.settings import Count, Share
from ....modules.static_bev.network import StaticBev
from ...metrics.pooling import known
from .data import StaticSamples, StaticWindow
from .series import InstanceMetric, MapIou, SeriesMetric


@dataclass
class EvaluationConfig:
    """Settings of the evaluation."""

    iou_threshold: Share = 0.5  # probability from which on a cell counts as said; the best one has its own figure
    lost: tuple[str, ...] = ()  # cameras that are missing …
    lost_since: Literal["now", "start"] = "now"  # … at this moment only, so that the past has them, or all along
    constant_samples: Count = 256  # training samples whose mean map is the rival that sees nothing


@dataclass
class Metrics:
    """All figures of one network, or of a rival."""

    series: SeriesMetric
    iou: MapIou
    instances: InstanceMetric

    @classmethod
    def of(cls, model: StaticBev, config: EvaluationConfig) -> "Metrics":
        head, grid = model.config.head, model.head.grid
        iou = MapIou((*head.lanes, *head.road), config.iou_threshold)
        return cls(SeriesMetric(grid, head.lanes), iou, InstanceMetric(head.instances))

    def add(self, token: str, maps: torch.Tensor, found, truth, row: int, ground) -> None:
        """Adds a sample: maps (lanes + road, rows, columns) of probabilities, instances or None, its truth."""
        lanes = len(self.series.settings["classes"])
        self.series.add(token, maps[:lanes].cpu().numpy(), ground.lines, ground.labels)
        known_cells = torch.cat([
            truth.lanes_known[row][:, None, None] & (truth.unknown_lanes[row] < 128),
            truth.road_known[row][:, None, None].expand_as(truth.road[row]),
        ])  # fmt: skip
        self.iou.add(token, maps, torch.cat([truth.lanes[row], truth.road[row]]) >= 128, known_cells)
        if found is not None:
            true = truth.instances[row].cpu()
            known = truth.instances_known[row].tolist()
            self.instances.add(token, found.boxes.cpu(), found.scores.cpu(), true, known)

    def compute(self) -> dict[str, float]:
        """The figures over all ranks; those that do not exist are left out."""
        parts = self.iou, self.series, self.instances
        return known({name: x for part in parts for name, x in part.compute_over_ranks().items()})


@dataclass
class Said:
    """What the network says of one sample of a batch."""

    maps: torch.Tensor  # (lanes + road, rows, columns) probabilities
    instances: object  # `head.Instances`
    weights: torch.Tensor | None  # (1 + K, rows, columns) of the features' grid, of a gate
    past: object  # `history.History`, or None
    found: float | None  # share of the intervals that found a frame


class Streamer:
    """Runs a network over the batches of a loader that gives whole scenes in order.

    A sample's past is what the same scene showed before. Cameras of `lost` are missing now; the past has them.

    Args:
        model: in evaluation mode.
        cameras: the rig's names.
        config: see `EvaluationConfig`.
    """

    def __init__(self, model: StaticBev, cameras: tuple[str, ...], config: EvaluationConfig):
        unknown = [name for name in config.lost if name not in cameras]
        if unknown:
            raise ValueError(f"evaluation.lost names {unknown[0]!r}; the rig has {', '.join(cameras)}")
        self.model, self.config, self.history = model, config, model.new_history()
        self.lost = [cameras.index(name) for name in config.lost]

    @torch.no_grad()
    def __call__(self, batch: StaticWindow) -> list[Said]:
        """What is said of each sample of a batch."""
        whole = batch.features[-1] if batch.features else self.model.see(batch.observations[-1])
        now = whole
        if self.lost:
            now = self._without(batch)
            whole = now if self.config.lost_since == "start" else whole
        return [self._one(now, whole, batch.frames[-1].one(row), row) for row in range(len(batch.tokens))]

    def _without(self, batch):
        if batch.features:
            raise ValueError("evaluation.lost needs images: data.cache holds what all cameras have seen")
        observation = batch.observations[-1]
        visible = observation.visible.clone()
        visible[:, self.lost] = False
        images = observation.images.masked_fill(~visible[:, :, None, None, None], 0)
        return self.model.see(type(observation)(images, observation.frame, visible, observation.points))

    def _one(self, now, whole, frame, row):
        rows = slice(row, row + 1)
        present = tuple(x[rows] for x in now)
        reads = self.model.config.fusion.reads_history
        past = self.history.pick(frame, present[0]) if reads else None
        output, fused, found = self.model.fuse(present, frame, self.history)
        if reads:
            self.history.push(whole[0][rows], frame)
        maps = torch.cat([output.lanes, output.road], dim=1)[0].sigmoid()
        weights = fused.weights[0] if fused is not None and fused.weights is not None else None
        return Said(maps, self.model.head.decode(output)[0], weights, past, found)


def evaluate_static(model: StaticBev, loader, config: EvaluationConfig, samples: StaticSamples, constant) -> dict:
    """All figures: `iou`, `series/…`, `ap/…`, `history/found`, and `constant/…` of the mean map of the training labels.

    Args:
        model: the network.
        loader: batches of the validation set on the device.
        config: see `EvaluationConfig`.
        samples: of the validation set, for the rig's names.
        constant: (lanes + road, rows, columns), the rival.
    """
    own, rival = Metrics.of(model, config), Metrics.of(model, config)
    streamer, found = Streamer(model, samples.names, config), []
    for batch in loader:
        for row, said in enumerate(streamer(batch)):
            place = batch.tokens[row], batch.truth, row, batch.ground[row]
            own.add(place[0], said.maps, said.instances, *place[1:])
            rival.add(place[0], constant.to(said.maps), None, *place[1:])
            found += [] if said.found is None else [said.found]
    figures = own.compute()
    figures |= {
        f"constant/{name}": x for name, x in rival.compute().items() if name in ("iou", "iou_best", "series/f1_any")
    }
    return figures | ({"history/found": sum(found) / len(found)} if found else {})


def mean_map(samples: StaticSamples, places) -> torch.Tensor:
    """Sums the labels of some samples: (lanes + road + 1, rows, columns) float64, the last map is their number."""
    total = torch.zeros(len(samples.model.head.lanes) + len(samples.model.head.road) + 1, *samples.grid.shape).double()
    for place in places:
        truth = samples.labels(place)[1]
        total[:-1] += torch.cat([truth.lanes[0], truth.road[0]]).double() / 255
        total[-1] += 1
    return total
