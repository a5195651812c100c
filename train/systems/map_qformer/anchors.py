"""Where the points of map lines begin: centres of the training split's lines, in a JSON file."""

import json
from pathlib import Path

import torch

from ....modules.clusters import kmeans
from ....modules.polylines import spread_lines
from ...data.cache import tables_digest
from ...files import write_whole
from .data import MapDataConfig, MapSamples


def training_lines(samples: MapSamples) -> tuple[torch.Tensor, torch.Tensor]:
    """All lines of a set, (L, points, 2) metres, and their labels (L,)."""
    truths = [samples.lines(place) for place in range(len(samples.places))]
    return torch.cat([truth.lines[0][:, 0] for truth in truths]), torch.cat([truth.labels[0] for truth in truths])


def find_anchors(samples: MapSamples, seed: int = 0) -> torch.Tensor:
    """k-means over the lines of a training set, taken as they are in the truth, not in all their orders: (instances,
    points, 2) metres. Where there are fewer different lines than instances, lines that are spread evenly."""
    model = samples.model
    lines, _ = training_lines(samples)
    try:
        return kmeans(lines.flatten(1), model.instances, seed).unflatten(1, (model.points, 2))
    except ValueError:  # too few different lines
        return spread_lines(model.instances, model.points, model.line_range)


def write_anchors(path: str | Path, anchors: torch.Tensor, data: MapDataConfig) -> None:
    """Writes anchors as JSON, with the digest of the tables that they are of."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = dict(root=data.root, tables=tables_digest(data.root, data.version), lines=anchors.tolist())
    write_whole(Path(path), json.dumps(content) + "\n")


def read_anchors(path: str | Path) -> torch.Tensor:
    """Reads what `write_anchors` wrote; ValueError where the file is not there or holds no anchors."""
    try:
        return torch.tensor(json.loads(Path(path).read_text())["lines"], dtype=torch.float32)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"anchors is {path}: no anchors there ({error}); generate_gt_cache.py --anchors FILE"
        ) from None
