"""Anchors from the training split: what instances, futures and plans begin as, in a JSON file."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from ....modules.sparse_drive.anchors import (
    Anchors,
    box_anchors,
    line_anchors,
    motion_anchors,
    plan_anchors,
    spread_anchors,
)
from ...data.cache import tables_digest
from ...data.driving_truth import DrivingTruth
from ...files import write_whole
from .data import DrivingSamples
from .mirror import mirrored_truth


def find_anchors(samples: DrivingSamples, seed: int = 0) -> Anchors:
    """k-means over every sample of a training set, see `modules.sparse_drive.anchors`. Lines are taken as they are in
    the truth, not in all their orders; where training mirrors samples, those in the mirror count too.

    Where the data has fewer different boxes, lines or ways than there are anchors, the evenly spread ones are taken.
    """
    head, found = samples.model.head, []
    for place in range(len(samples.places)):
        moment = samples.moment(place)
        driving = DrivingTruth.from_arrays(samples.truth[moment.token])
        found.append(samples.targets(moment, driving, torch.full((1,), torch.nan)))
    if samples.config.mirror:
        found += [mirrored_truth(truth) for truth in found]
    each = lambda name: torch.cat([getattr(truth, name)[0] for truth in found])  # noqa: E731
    boxes, labels = each("boxes"), each("labels")
    ego_way, ego_known = (torch.cat([getattr(truth, name) for truth in found]) for name in _EGO)
    command = torch.cat([truth.command for truth in found])
    spread, motion = spread_anchors(head), head.motion
    ways = each("futures"), each("future_known").bool(), boxes[:, 6], labels, len(head.classes), motion.modes
    return Anchors(
        _or(spread.boxes, box_anchors, boxes, head.detection.anchors, seed=seed),
        _or(spread.lines, line_anchors, each("lines")[:, 0], head.lines.anchors, seed=seed),
        _or(spread.motion, motion_anchors, *ways, seed=seed),
        _or(spread.plan, plan_anchors, ego_way, ego_known.bool(), command, motion.plan_modes, seed=seed),
    )


_EGO = ("ego_future", "ego_future_known")


def _or(spread, find, *arguments, seed):
    try:
        return find(*arguments, seed=seed)
    except ValueError:  # too few different samples
        return spread


def write_anchors(path: str | Path, anchors: Anchors, root: str | Path, version: str | None) -> None:
    """Writes anchors as JSON, with the digest of the tables that they are of."""
    values = {name: value.tolist() for name, value in asdict(anchors).items()}
    content = dict(root=str(root), tables=tables_digest(root, version), anchors=values)
    write_whole(Path(path), json.dumps(content) + "\n")


def read_anchors(path: str | Path) -> Anchors:
    """Reads what `write_anchors` wrote.

    Raises:
        ValueError: the file holds no anchors.
    """
    try:
        values = json.loads(Path(path).read_text())["anchors"]
        return Anchors(**{f.name: torch.tensor(values[f.name], dtype=torch.float32) for f in fields(Anchors)})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no anchors ({error}); train/tools/make_anchors.py makes such a file") from None
