"""What a driving model is judged by: detection, tracking, map, motion and planning, over drives that are streamed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ....modules.camera_dropout import DropoutConfig
from ....modules.detection.boxes import DETECTION_CLASSES, Detections
from ....modules.settings import Positive, Share
from ....modules.sparse_drive.head import DriveOutput, HeadConfig
from ....modules.sparse_drive.results import DriveResult, ResultConfig, read_results
from ...data.splits import split_names
from ...metrics.any_class import AnyClassMetric
from ...metrics.detection import evaluate_detection
from ...metrics.map import MapMetric
from ...metrics.motion import FoundAgents, MotionMetric, TrueAgents
from ...metrics.planning import PlanningMetric
from ...metrics.planning_baselines import baseline_paths
from ...metrics.pooling import known
from ...metrics.tracking import TrackingMetric
from .data import DriveBatch
from .frames import moved_boxes, shifted_boxes, turned_paths
from .model import CompletedModel, DrivingModel, Present

if TYPE_CHECKING:
    from .experiment import DriveExperiment

TASKS = ("detection", "tracking", "map", "motion", "planning")
GUARD = dict(nds=0.015, l2=0.02)  # with all cameras: how far NDS may fall, and the plan's L2 rise (metres)
_MEASURED = "measured status"  # plans of a head that is told how fast the vehicle is
_OF_BASELINES = ("L2/mean", "L2/endpoint", "collision/mean")

Model = DrivingModel | CompletedModel
Look = Callable[[Model, DriveBatch], Present]  # what stands for the cameras


@dataclass
class EvaluationConfig:
    tasks: tuple[str, ...] = TASKS
    sure: Share = 0.2  # class score from which on a box counts as a track, and its future as predicted
    masked: bool = True  # with completion: also evaluate with fixed losses of cameras
    # With completion: what a model had before it, with all cameras. A checkpoint that has lost more than `GUARD` of it
    # is never the best by "guarded/NDS". None = no guard.
    reference_nds: Share | None = None
    reference_l2: Positive | None = None  # plan/L2/mean, metres

    def validate(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown or "detection" not in self.tasks:
            raise ValueError(f"tasks are {', '.join(self.tasks)}, needs detection, and of {', '.join(TASKS[1:])}")


@dataclass(frozen=True, eq=False)
class Seen:
    """One sample as the head saw it: `index` in its batch, results, and the plan of a head with measured status."""

    batch: DriveBatch
    index: int
    result: DriveResult
    measured: torch.Tensor | None  # (plan steps, 2)


def look(model: Model, batch: DriveBatch) -> Present:
    """All cameras, as they are."""
    return model.present(batch)


@dataclass(frozen=True)
class Fault:
    """A `Look` at drives in which cameras are missing.

    Args:
        cameras: their names; none = nobody is missing.
        lasting: moments that the fault lasts, after which the cameras are there for as many, and so on from the second
            such part of the scene on; 0 = it lasts for the whole drive.
        hide: without completion, the head does not look at missing cameras; False = it looks at black.
    """

    cameras: tuple[str, ...]
    lasting: int = 0
    hide: bool = True

    def __call__(self, model: Model, batch: DriveBatch) -> Present:
        absent = torch.tensor([name in self.cameras for name in model.head.config.cameras])
        now = torch.tensor([not self.lasting or place // self.lasting % 2 == 1 for place in batch.order])
        return model.present(batch, now[:, None] & absent, self.hide)


def masked_by_token(config: DropoutConfig) -> Look:
    """A fixed draw of `RandCamMask` for each sample, without faults that last: the same for every checkpoint."""

    def masked(model: Model, batch: DriveBatch) -> Present:
        cameras, missing = len(model.head.config.cameras), []
        for token in batch.tokens:
            rng = np.random.default_rng(list(token.encode()))
            count = int(rng.integers(config.n_min, config.n_max + 1)) * int(rng.random() < config.p_missing)
            missing.append(np.isin(np.arange(cameras), rng.permutation(cameras)[:count]))
        return model.present(batch, torch.from_numpy(np.stack(missing)))

    return masked


@torch.no_grad()
def drive(
    model: Model, batches: Iterable[DriveBatch], results: ResultConfig, see: Look = look, measured: bool = False
) -> Iterator[Seen]:
    """Streams drives through a model in evaluation: one pass of the backbone a moment, the head's state handed on.

    Args:
        model: with motion or without.
        batches: moments in temporal order, scene after scene, on the model's device.
        results: see `ResultConfig`.
        see: what stands for the cameras.
        measured: run the head a second time beside, with the measured speed of the vehicle (see
            `MotionConfig.ego_speed`). It has a state of its own.
    """
    model.eval()
    heads = ("predicted", "measured") if measured and model.head.motion is not None else ("predicted",)
    states = dict.fromkeys(heads)
    for batch in batches:
        maps, size, visible = see(model, batch)
        for index in range(len(batch.tokens)):
            rows = slice(index, index + 1)
            facts = [level[rows] for level in maps], batch.frames[-1].one(index), size
            options = dict(visible=None if visible is None else visible[rows], ego_status=batch.status[rows, -1])
            found = {}
            for name in heads:
                state = None if batch.order[index] == 0 else states[name]
                found[name], states[name] = _run(model, name, facts, state, options)
            read = {name: _result(output, batch, rows, model, results) for name, output in found.items()}
            other = read["measured"].plan if "measured" in read else None
            yield Seen(batch, index, read["predicted"], other)


def _run(model, speed, facts, state, options):
    """The head with the vehicle's speed as predicted, or measured."""
    if model.head.motion is None:
        return model.head(*facts, state, **options)
    config = model.head.motion.config
    own, config.ego_speed = config.ego_speed, speed
    try:
        return model.head(*facts, state, **options)
    finally:
        config.ego_speed = own


def _result(output: DriveOutput, batch, rows, model, results):
    command = None if output.motion is None else batch.truth.command[rows]
    (result,) = read_results(output, command, model.head.config, results)
    return result


class DrivingFigures:
    """Collects samples of one rank and gives the figures of all ranks.

    Args:
        settings: of the experiment; names the data and the tasks.
        head: whose classes and steps they are.
    """

    def __init__(self, settings: "DriveExperiment", head: HeadConfig):
        data, self.head, self.settings = settings.data, head, settings
        self.split = split_names(data)[1]
        self.tasks = [task for task in settings.evaluation.tasks if head.with_motion or task in TASKS[:3]]
        self.detections, self.any_class = {}, AnyClassMetric(data.box_distance)
        self.map = MapMetric(head.line_classes)
        self.tracking = TrackingMetric(data.root, data.version, self.split)
        self.motion = MotionMetric()
        self.plans = {}

    def add(self, seen: Seen) -> None:
        """Adds one sample; moving tensors off the device is all that it costs."""
        result, token = _on_cpu(seen.result), seen.batch.tokens[seen.index]
        truth = seen.batch.truth
        names = [self.head.classes[label] for label in result.labels.tolist()]
        boxes = moved_boxes(result.boxes[:, :9], seen.batch.ego_T_frame[seen.index])  # figures are about the ego frame
        sure = result.class_scores >= self.settings.evaluation.sure
        labels = torch.tensor([DETECTION_CLASSES.index(name) for name in names], dtype=torch.int64)
        self.detections[token] = Detections(boxes, result.scores, labels)
        true = moved_boxes(truth.boxes[seen.index].cpu().double(), seen.batch.ego_T_frame[seen.index])
        self.any_class.add(token, boxes, result.scores, true)
        chosen = sure.nonzero()[:, 0].tolist()
        if "tracking" in self.tasks:
            kept = [names[place] for place in chosen]
            self.tracking.add(token, boxes[sure], kept, result.scores[sure], result.ids[sure].tolist())
        if "map" in self.tasks:
            lines, line_labels = truth.lines[seen.index][:, 0].cpu(), truth.line_labels[seen.index].cpu()
            self.map.add(token, result.lines, result.line_labels, result.line_scores, lines, line_labels)
        if "motion" in self.tasks:
            found = FoundAgents(
                [names[p] for p in chosen], result.boxes[sure, :9], result.scores[sure], result.futures[sure]
            )
            self.motion.add(token, found, self._true_agents(truth, seen.index))
        if "planning" in self.tasks:
            self._add_plans(token, seen, result)

    def _true_agents(self, truth, index):
        boxes = truth.boxes[index].cpu()
        paths = truth.futures[index].cpu().cumsum(1) + boxes[:, None, :2]
        names = [self.head.classes[label] for label in truth.labels[index].tolist()]
        return TrueAgents(names, boxes, paths, truth.future_known[index].cpu())

    def _add_plans(self, token, seen, result):
        """In the axes of the ego frame, about the point whose path the plans are."""
        batch, index, steps, frame = seen.batch, seen.index, self.head.motion.plan_steps, self.settings.data.frame
        truth, ego_T_frame = batch.truth, batch.ego_T_frame[index]
        about = lambda boxes: shifted_boxes(boxes, ego_T_frame)  # noqa: E731
        boxes = about(moved_boxes(truth.boxes[index].cpu().double(), ego_T_frame).numpy())
        path = turned_paths(truth.ego_future[index].cpu().cumsum(0), ego_T_frame)
        paths = {"": turned_paths(result.plan.cpu(), ego_T_frame)}
        paths |= baseline_paths(batch.velocity[index], boxes, frame, steps)
        if seen.measured is not None:
            paths[_MEASURED] = turned_paths(seen.measured.cpu(), ego_T_frame)
        others = [about(step) for step in batch.others[index]]
        for name, plan in paths.items():
            metric = self.plans.setdefault(name, PlanningMetric(frame, steps))
            metric.add(token, plan, path, truth.ego_future_known[index].cpu(), others)

    def compute(self) -> dict[str, float]:
        """The figures that exist, the same on every rank; all ranks must call this.

        Detection: as `evaluate_detection`, and `AnyClassMetric` within the distance that is learned. The others have
        their task in front: tracking/AMOTA, map/mAP, motion/minADE/car, plan/L2/mean, …; plan/NAME/… is that of a plan
        without a network (which is given the true boxes and velocity), or of the head that is told the vehicle's
        measured status.
        """
        data = self.settings.data
        figures = evaluate_detection(self.detections, data.root, data.version, self.split)
        figures |= self.any_class.compute_over_ranks()
        if "tracking" in self.tasks:
            figures |= _named("tracking", self.tracking.compute_over_ranks())
        if "map" in self.tasks:
            figures |= _named("map", self.map.compute_over_ranks())
        if "motion" in self.tasks:
            figures |= _named("motion", self.motion.compute_over_ranks())
        for name in self._plan_names():
            metric = self.plans.get(name, PlanningMetric(data.frame, self.head.motion.plan_steps))
            found = metric.compute_over_ranks()
            short = {key: found[key] for key in _OF_BASELINES}
            figures |= _named(f"plan/{name}" if name else "plan", short if name else found)
        return known(figures)

    def _plan_names(self):
        if "planning" not in self.tasks:
            return []
        return ["", *baseline_paths((0.0, 0.0), []), _MEASURED]


def _named(task, figures):
    return {f"{task}/{name}": value for name, value in figures.items()}


def _on_cpu(result: DriveResult) -> DriveResult:
    moved = {name: None if tensor is None else tensor.cpu() for name, tensor in vars(result).items()}
    return DriveResult(**moved)


def evaluate_driving(
    settings: "DriveExperiment", model: Model, loader, see: Look = look, measured: bool = True
) -> dict[str, float]:
    """Streams a rank's scenes and gives the figures of all ranks, see `DrivingFigures.compute`."""
    figures = DrivingFigures(settings, model.head.config)
    for seen in drive(model, loader, settings.results, see, measured and "planning" in figures.tasks):
        figures.add(seen)
    return figures.compute()
