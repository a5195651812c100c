"""What instances begin as: places where objects and lines were seen, and ways that agents went."""

import math
from dataclasses import dataclass

import torch

from ..clusters import kmeans
from ..polylines import spread_lines
from .motion import COMMANDS, turned

_CAR = (4.6, 1.9, 1.7)  # metres


@dataclass(frozen=True, eq=False)
class Anchors:
    """All float32, in the frame of the head; places in metres."""

    boxes: torch.Tensor  # (N, 11), see `boxes`
    lines: torch.Tensor  # (N, points · 2)
    motion: torch.Tensor | None = None  # (classes, modes, steps, 2), places in the agent's own frame, x ahead
    plan: torch.Tensor | None = None  # (3, plan modes, plan steps, 2), places, by command


def box_anchors(boxes: torch.Tensor, count: int, *, largest_distance: float = 55.0, seed: int = 0) -> torch.Tensor:
    """Anchors (count, 11) where boxes are seen: of their mean size, ahead, standing still (Sparse4D).

    boxes: (M, 9) x, y, z, length, width, height, yaw, vx, vy of all moments; those beyond `largest_distance` metres and
    those that are not finite do not count.
    """
    places = boxes[:, :6]
    near = places.isfinite().all(1) & (places[:, :2].norm(dim=1) <= largest_distance)
    centres = kmeans(places[near, :3], count, seed)
    return _boxes(centres, places[near, 3:].mean(0).log())


def line_anchors(lines: torch.Tensor, count: int, *, seed: int = 0) -> torch.Tensor:
    """Anchors (count, points · 2) of the lines (M, points, 2) of all moments."""
    return kmeans(lines.flatten(1), count, seed)


def motion_anchors(
    steps: torch.Tensor, known: torch.Tensor, yaw: torch.Tensor, labels: torch.Tensor, classes: int, modes: int,
    *, seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Ways (classes, modes, T, 2) that the agents of each class go, in their own frames.

    Args:
        steps: (M, T, 2) metres, each from the one before, in the ego frame.
        known: (M, T) bool; only agents with a whole future count.
        yaw: (M,) of the agents.
        labels: (M,) int64.

    A class of which fewer different ways than modes are known takes those of all classes together.
    """
    whole = known.all(1)
    heading = torch.stack([-yaw.sin(), yaw.cos()], dim=1)[whole]  # of the turn back
    pose = torch.cat([torch.zeros(len(heading), 6), heading], dim=1)
    ways = turned(steps[whole].cumsum(1)[None], pose[None])[0].flatten(1)
    labels = labels[whole]
    anchors = []
    for label in range(classes):
        own = ways[labels == label]
        enough = len(torch.unique(own, dim=0)) >= modes
        anchors.append(kmeans(own if enough else ways, modes, seed))
    return torch.stack(anchors).unflatten(-1, (-1, 2))


def plan_anchors(
    steps: torch.Tensor, known: torch.Tensor, command: torch.Tensor, modes: int, *, seed: int = 0
) -> torch.Tensor:
    """Ways (3, modes, T, 2) that were driven for each command: steps (M, T, 2), known (M, T) bool, command (M,).

    A command with fewer different ways than modes takes those of all together.
    """
    whole = known.all(1)
    ways, command = steps[whole].cumsum(1).flatten(1), command[whole]
    anchors = []
    for wanted in range(len(COMMANDS)):
        own = ways[command == wanted]
        enough = len(torch.unique(own, dim=0)) >= modes
        anchors.append(kmeans(own if enough else ways, modes, seed))
    return torch.stack(anchors).unflatten(-1, (-1, 2))


def spread_anchors(config) -> Anchors:
    """Anchors without data: cars evenly over a disc of 55 m, straight lines all over the range, straight ways at all
    speeds. `config` is a `HeadConfig`."""
    place = torch.arange(config.detection.anchors) + 0.5
    radius, angle = 55 * (place / config.detection.anchors).sqrt(), place * math.pi * (3 - math.sqrt(5))
    height = torch.full_like(place, config.ego.ground + _CAR[2] / 2)
    centres = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    boxes = _boxes(centres, torch.tensor(_CAR).log())
    lines = spread_lines(config.lines.anchors, config.lines.points, config.line_range).flatten(1)
    motion = config.motion
    ahead = torch.tensor([math.cos(config.ego.box[6]), math.sin(config.ego.box[6])])
    agents = _straight(motion.modes, motion.steps, torch.tensor([1.0, 0.0])).expand(len(config.classes), -1, -1, -1)
    plans = _straight(motion.plan_modes, motion.plan_steps, ahead).expand(len(COMMANDS), -1, -1, -1)
    return Anchors(boxes, lines, agents, plans)


def _boxes(centres, log_size):
    anchors = torch.zeros(len(centres), 11)
    anchors[:, :3], anchors[:, 3:6], anchors[:, 7] = centres, log_size, 1
    return anchors


def _straight(modes, steps, direction):
    """From standing still to 15 m/s, half a second a step: (modes, steps, 2)."""
    speed = torch.linspace(0, 15, modes)[:, None, None]
    return speed * 0.5 * torch.arange(1, steps + 1)[:, None] * direction
