"""From the head's outputs to what a vehicle is told: boxes with tracks and futures, map lines, one plan."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..settings import Count, Metres, NonNegative
from . import boxes
from .head import DriveOutput, HeadConfig
from .layers import best
from .motion import EgoConfig, MotionOutput

_SURE = 0.5  # agents less sure than this do not change a plan
_STILL = 0.5  # metres; who moves less over a future keeps its heading
_MARGIN = 1.1  # the ego vehicle's sides are taken this much longer when a plan is tested


@dataclass
class ResultConfig:
    boxes: Count = 300  # at most
    # Of boxes of one class whose centres are nearer to one another than this (metres, over the ground) the surest is
    # kept; 0, as upstream: all of them, and the head has to have learned to say each object once.
    apart: NonNegative = 0.0
    rescore: bool = True  # a plan that meets an agent's likeliest future loses to those that do not
    # Metres by which the vehicle's centre lies ahead of the point that plans move; None = where `EgoConfig.box` has it.
    # Upstream means 0.5 but shifts the wrong axis of its tensor, which comes to 0.
    rescore_shift: Metres | None = None
    # When rectangles meet: "area" = where they have a point in common; "corners", as upstream = where a corner of one
    # lies in the other, which misses two that cross.
    rescore_overlap: Literal["area", "corners"] = "area"


@dataclass
class DriveResult:
    """What one sample's moment holds, in the ego frame; the surest box first. On the outputs' device, no gradient."""

    boxes: torch.Tensor  # (K, 10): x, y, z, length, width, height, yaw, vx, vy, vz
    scores: torch.Tensor  # (K,) class score times centredness
    class_scores: torch.Tensor  # (K,) without centredness, in the order of the boxes
    labels: torch.Tensor  # (K,) int64
    ids: torch.Tensor  # (K,) int64, of the tracks
    lines: torch.Tensor  # (M, points, 2)
    line_scores: torch.Tensor  # (M,)
    line_labels: torch.Tensor  # (M,) int64
    futures: torch.Tensor | None = None  # (K, modes, steps, 2), places
    future_scores: torch.Tensor | None = None  # (K, modes)
    past: torch.Tensor | None = None  # (K, queue, 10), boxes of the last moments as seen from now, the newest last
    period: torch.Tensor | None = None  # (K,) int64, how many of these are real
    plans: torch.Tensor | None = None  # (3, plan modes, plan steps, 2), places, by command
    plan_scores: torch.Tensor | None = None  # (3, plan modes)
    plan: torch.Tensor | None = None  # (plan steps, 2), the one to drive


@torch.no_grad()
def read_results(
    output: DriveOutput, command: torch.Tensor | None, head: HeadConfig, config: ResultConfig | None = None
) -> list[DriveResult]:
    """The results of each sample.

    Args:
        output: of `SparseDriveHead`.
        command: (B,) int64, what the vehicle is asked to do, a place in `motion.COMMANDS`; None without motion.
        head: the head's configuration.
        config: see `ResultConfig`.
    """
    config = config or ResultConfig()
    detection, lines, motion = output.detection, output.lines, output.motion
    class_scores, labels = detection.logits[-1].sigmoid().max(-1)
    places = best(class_scores, config.boxes)
    rows = torch.arange(len(places), device=places.device)[:, None]
    scores = class_scores[rows, places] * detection.quality[-1][rows, places, 0].sigmoid()
    order = best(scores, scores.shape[1])
    places, scores = places[rows, order], scores[rows, order]
    found = boxes.decode(detection.anchors[-1][rows, places])
    chosen = None if motion is None else choose_plans(output, command, head.ego, config)

    results = []
    for sample, place in enumerate(places):
        kept = _surest(found[sample, :, :2], labels[sample, place], config.apart)
        place = place[kept]
        result = DriveResult(
            found[sample, kept], scores[sample, kept], class_scores[sample, place], labels[sample, place],
            detection.ids[sample, place], *_lines(lines.logits[-1][sample], lines.anchors[-1][sample]),
        )  # fmt: skip
        if motion is not None:
            _add_motion(result, motion, sample, place)
            result.plans = motion.plan_steps[sample].cumsum(-2)
            result.plan_scores, result.plan = (tensor[sample] for tensor in chosen)
        results.append(result)
    return results


def _surest(centres, labels, apart):
    """Which of K boxes are kept, (K,) bool: centres (K, 2) and labels (K,), the surest first."""
    kept = torch.ones_like(labels, dtype=torch.bool)
    if apart > 0:
        near = (torch.cdist(centres, centres) < apart) & (labels[:, None] == labels)
        near = near.triu(diagonal=1)
        for row, others in enumerate(near):
            kept &= ~(others & kept[row])
    return kept


def _lines(logits, anchors):
    """As many pairs of line and class as there are lines, the surest first; a line may appear with several classes."""
    count, classes = logits.shape
    scores = logits.sigmoid().flatten()
    pairs = best(scores[None], count)[0]
    return anchors[pairs // classes].unflatten(-1, (-1, 2)), scores[pairs], pairs % classes


def _add_motion(result: DriveResult, motion: MotionOutput, sample: int, place: torch.Tensor) -> None:
    start = result.boxes[:, None, None, :2]
    result.futures = motion.steps[sample, place].cumsum(-2) + start
    result.future_scores = motion.logits[sample, place].sigmoid()
    result.past = boxes.decode(motion.past[sample, place])
    result.period = motion.period[sample, place]


def choose_plans(
    output: DriveOutput, command: torch.Tensor, ego: EgoConfig, config: ResultConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, 3, plan modes) of all plans, and the places (B, plan steps, 2) of each sample's best for its command.

    With `rescore` a plan of that command which meets a sure agent on its likeliest future scores zero, unless all do.
    """
    motion = output.motion
    rows = torch.arange(len(command), device=command.device)
    logits, plans = motion.plan_logits[rows, command], motion.plan_steps[rows, command].cumsum(-2)
    scores = motion.plan_logits.sigmoid()
    if config.rescore:
        meets = plans_meet_agents(output, plans, ego, config)
        meets &= ~meets.all(1, keepdim=True)
        logits = logits.masked_fill(meets, -torch.inf)
        scores[rows, command] = logits.sigmoid()
    return scores, plans[rows, logits.argmax(1)]


def plans_meet_agents(output: DriveOutput, plans: torch.Tensor, ego: EgoConfig, config: ResultConfig) -> torch.Tensor:
    """Which plans (B, modes, steps, 2) lead into an agent, if it takes its likeliest future: (B, modes) bool.

    The rectangles of the vehicle and of an agent are compared at each step, see `ResultConfig`.
    """
    detection, motion = output.detection, output.motion
    anchors, steps = detection.anchors[-1], plans.shape[2]
    likeliest = motion.logits.argmax(-1)[..., None, None, None].expand(-1, -1, 1, *motion.steps.shape[3:])
    places = motion.steps.gather(2, likeliest)[:, :, 0, :steps].cumsum(-2)  # (B, N, steps, 2)
    yaw = torch.atan2(anchors[..., 6], anchors[..., 7])
    agents = _poses(places + anchors[..., None, :2], anchors[..., :2], yaw)
    agent_size = anchors[..., 3:5].exp()[:, None, :, None]

    x, y, *_, ahead = ego.box
    vehicle = _poses(plans, torch.zeros_like(plans[..., 0, :]), torch.full_like(plans[..., 0, 0], ahead))
    shift = (x * x + y * y) ** 0.5 if config.rescore_shift is None else config.rescore_shift
    heading = torch.stack([vehicle[..., 2].cos(), vehicle[..., 2].sin()], dim=-1)
    vehicle = torch.cat([vehicle[..., :2] + shift * heading, vehicle[..., 2:]], dim=-1)
    vehicle_size = _MARGIN * vehicle.new_tensor(ego.box[3:5])

    vehicle, agents = vehicle[:, :, None], agents[:, None]  # (B, modes, N, steps, 3)
    if config.rescore_overlap == "corners":
        meets = _corner_inside(vehicle, vehicle_size, agents, agent_size)
        meets |= _corner_inside(agents, agent_size, vehicle, vehicle_size)
    else:
        meets = _overlap_along(vehicle, vehicle_size, agents, agent_size)
        meets &= _overlap_along(agents, agent_size, vehicle, vehicle_size)
    sure = detection.logits[-1].sigmoid().amax(-1) >= _SURE
    return (meets & sure[:, None, :, None]).flatten(2).any(-1)


def _poses(places, start, yaw):
    """places (…, steps, 2) that follow `start` (…, 2), where the heading is yaw (…) → x, y, heading (…, steps, 3).

    The heading is along the way from the place before to the place after; who hardly moves keeps that of the start."""
    way = torch.cat([start[..., None, :], places], dim=-2)
    along = torch.cat([way[..., 2:, :], way[..., -1:, :]], dim=-2) - way[..., :-1, :]
    heading = torch.atan2(along[..., 1], along[..., 0])
    still = (way[..., -1, :] - way[..., 0, :]).norm(dim=-1) < _STILL
    heading = torch.where(still[..., None], yaw[..., None], heading)
    return torch.cat([places, heading[..., None]], dim=-1)


def _corner_inside(a, a_size, b, b_size):
    """Whether a corner of rectangle b (x, y, heading; length, width) lies in rectangle a."""
    return (_corners(a, b, b_size).abs() <= a_size[..., None, :] / 2).all(-1).any(-1)


def _overlap_along(a, a_size, b, b_size):
    """Whether the shadows of rectangle b on the sides of rectangle a touch those of a: if they do so on the sides of
    both, the rectangles have a point in common."""
    low, high = _corners(a, b, b_size).aminmax(dim=-2)
    return ((low <= a_size / 2) & (high >= -a_size / 2)).all(-1)


def _corners(a, b, b_size):
    """Corners (…, 4, 2) of rectangle b in the frame of a."""
    signs = a.new_tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    own = _turn(signs * b_size[..., None, :], (b[..., 2] - a[..., 2])[..., None])
    return own + _turn(b[..., :2] - a[..., :2], -a[..., 2])[..., None, :]


def _turn(vectors, angle):
    x, y = vectors.unbind(-1)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
