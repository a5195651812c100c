"""Figures of static BEV over a split, streamed scene by scene: series of lanes, IoU, instances, beside a constant."""

from dataclasses import dataclass
from typing import Literal

import torch

from ....modules.settings import Count, NonNegative, Share, Whole
from ....modules.static_bev.head import Instances
from ....modules.static_bev.history import History
from ....modules.static_bev.network import StaticBev
from ...distributed import sum_over_ranks
from ...metrics.pooling import known
from .data import StaticSamples, StaticWindow
from .series import InstanceMetric, MapIou, SeriesMetric

_SAME_MOMENT = 1e-3  # seconds, between timestamps that mean the same


@dataclass
class EvaluationConfig:
    """Settings of the evaluation."""

    iou_threshold: Share = 0.5  # probability from which on a cell counts as said; the best one has its own figure
    lost: tuple[str, ...] = ()  # cameras that are missing …
    lost_since: Literal["now", "start"] = "now"  # … at this moment only, so that the past has them, or all along
    every: Count = 1  # judges one moment of so many; the past has them all
    since: NonNegative = 0.0  # … and only moments at least so many seconds after the first of their scene
    constant_samples: Count = 256  # training samples whose mean map is the rival that sees nothing
    pictures: Whole = 0  # samples that each evaluation draws into the run's folder, on the first rank
    picture_steps: Whole = 0  # training draws the first sample of its batch every so many steps; 0 = never


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
    instances: Instances
    weights: torch.Tensor | None  # (1 + K, rows, columns) of the features' grid, of a gate
    past: History | None
    found: float | None  # share of the intervals that found a frame


class Judged:
    """Says of the moments of whole scenes, one after another, which are judged: of `config.every` moments, not counting
    those before `config.since`, the first."""

    def __init__(self, config: EvaluationConfig):
        self.config, self._moments, self._scene, self._began = config, 0, "", 0.0  # counted so far; scene and its start

    def __call__(self, scene: str, second: float) -> bool:
        if scene != self._scene:
            self._scene, self._began = scene, second
        if second - self._began < self.config.since - _SAME_MOMENT:
            return False
        self._moments += 1
        return (self._moments - 1) % self.config.every == 0


class Streamer:
    """Runs a network over the batches of a loader that gives whole scenes in order.

    A sample's past is what the same scene showed before. Cameras of `lost` are missing now; the past has them. Moments
    that are not `Judged` are remembered only.

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
        self._judges = Judged(config)

    @torch.no_grad()
    def __call__(self, batch: StaticWindow) -> list[Said | None]:
        """What is said of each sample of a batch; None where it isn't judged."""
        now = batch.frames[-1]
        judged = [self._judges(scene, second) for scene, second in zip(now.scene, now.timestamp.tolist())]
        reads = self.model.config.fusion.reads_history
        if not reads and not any(judged):
            return [None] * len(judged)
        whole = batch.features[-1] if batch.features else self.model.see(batch.observations[-1])
        now, since_start = whole, self.config.lost_since == "start"
        if self.lost and (since_start or any(judged)):
            now = self._without(batch)
            whole = now if since_start else whole
        said = []
        for row, here in enumerate(judged):
            frame = batch.frames[-1].one(row)
            said.append(self._one(now, frame, row) if here else None)
            if reads:
                self.history.push(whole[0][row : row + 1], frame)
        return said

    def _without(self, batch):
        if batch.features or batch.observations[-1].images is None:
            raise ValueError("evaluation.lost needs images: data.cache holds what all cameras saw; LiDAR loses none")
        observation = batch.observations[-1]
        visible = observation.visible.clone()
        visible[:, self.lost] = False
        images = observation.images.masked_fill(~visible[:, :, None, None, None], 0)
        return self.model.see(type(observation)(images, observation.frame, visible, observation.points))

    def _one(self, now, frame, row):
        present = tuple(x[row : row + 1] for x in now)
        past = self.history.pick(frame, present[0]) if self.model.config.fusion.reads_history else None
        output, fused, found = self.model.fuse(present, frame, self.history)
        maps = torch.cat([output.lanes, output.road], dim=1)[0].sigmoid()
        weights = fused.weights[0] if fused is not None and fused.weights is not None else None
        return Said(maps, self.model.head.decode(output)[0], weights, past, found)


@dataclass
class Measured:
    """What an evaluation has counted on this rank."""

    own: Metrics
    rival: Metrics
    found: list[float]  # for each sample, the share of the intervals that found a frame

    def figures(self) -> dict[str, float]:
        """Over all ranks: `iou`, `series/…`, `ap/…`, `history/found`, and `constant/…` of the rival."""
        figures = self.own.compute()
        beside = ("iou", "iou_best", "series/f1_any")
        figures |= {f"constant/{name}": value for name, value in self.rival.compute().items() if name in beside}
        found, count = sum_over_ranks(torch.tensor([sum(self.found), len(self.found)], dtype=torch.float64)).tolist()
        return figures | ({"history/found": found / count} if count else {})


def measure(
    model: StaticBev,
    loader,
    config: EvaluationConfig,
    cameras: tuple[str, ...],
    constant: torch.Tensor | None = None,
    look=None,
) -> Measured:
    """Streams the batches of a loader through a network and counts.

    Args:
        model: the network.
        loader: batches of whole scenes in order, on the device.
        config: see `EvaluationConfig`.
        cameras: the rig's names.
        constant: (lanes + road, rows, columns), the rival that says the same of every sample; None = there is none.
        look: called with (batch, row, said) of each sample.
    """
    own, rival = Metrics.of(model, config), Metrics.of(model, config)
    streamer, found = Streamer(model, cameras, config), []
    for batch in loader:
        for row, said in enumerate(streamer(batch)):
            if said is None:
                continue
            token, place = batch.tokens[row], (batch.truth, row, batch.ground[row])
            own.add(token, said.maps, said.instances, *place)
            if constant is not None:
                rival.add(token, constant.to(said.maps), None, *place)
            found += [] if said.found is None else [said.found]
            if look is not None:
                look(batch, row, said)
    return Measured(own, rival, found)


def sum_of_labels(samples: StaticSamples, places) -> torch.Tensor:
    """Sums the labels of some samples: (lanes + road + 1, rows, columns) float64, the last map is their number."""
    total = torch.zeros(len(samples.model.head.lanes) + len(samples.model.head.road) + 1, *samples.grid.shape).double()
    for place in places:
        truth = samples.labels(place)[1]
        total[:-1] += torch.cat([truth.lanes[0], truth.road[0]]).double() / 255
        total[-1] += 1
    return total
