"""Rivals of a trained driving model that have learned nothing: a memory of the training split."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from ....modules.sparse_drive.losses import DriveTruth
from ....modules.sparse_drive.results import DriveResult
from .data import DriveBatch, DrivingSamples, collate
from .evaluate import Seen

_THUMB = (6, 10)  # height and width of what is remembered of an image


def results_of_truth(truth: DriveTruth, index: int, score: float = 0.9) -> DriveResult:
    """The results of a model for which the truth of a sample is what it sees: every box, line and way, once."""
    boxes, lines = truth.boxes[index].nan_to_num(), truth.lines[index][:, 0]
    paths = truth.futures[index].cumsum(1) + boxes[:, None, :2]
    scores, line_scores = (torch.full((len(values),), score) for values in (boxes, lines))
    return DriveResult(
        torch.cat([boxes, torch.zeros(len(boxes), 1)], dim=1), scores, scores, truth.labels[index],
        torch.arange(len(boxes)), lines, line_scores, truth.line_labels[index],
        futures=paths[:, None], plan=truth.ego_future[index].cumsum(0),
    )  # fmt: skip


class Memory:
    """Says of a moment what was true of the moment of the training split whose images look most alike.

    Images are compared as thumbnails of all cameras, by their distance. Whoever cannot beat it has learned scenes by
    heart, or the mean of the training split.
    """

    def __init__(self, samples: DrivingSamples):
        plain = replace(samples.config, history=0)
        samples = DrivingSamples(samples.drives, plain, False, 0, samples.model, samples.truth)
        self._truths, thumbs = [], []
        for index in range(len(samples)):
            batch = samples[0, index].to("cpu")
            thumbs.append(thumbnails(batch))
            self._truths.append(batch.truth)
        self._thumbs = torch.cat(thumbs)

    def drive(self, batches: Iterable[DriveBatch]) -> Iterator[Seen]:
        """As `evaluate.drive`, without a network. Surer where the images are more alike."""
        for batch in batches:
            apart = torch.cdist(thumbnails(batch)[None], self._thumbs[None])[0]
            for index, (distance, place) in enumerate(zip(*apart.min(1))):
                result = results_of_truth(self._truths[place], 0, score=float(torch.exp(-distance / 100)))
                yield Seen(batch, index, result, None)


def thumbnails(batch: DriveBatch) -> torch.Tensor:
    """The present images of all cameras, small: (B, numbers)."""
    return (
        F.adaptive_avg_pool2d(batch.images[:, -1].cpu().flatten(0, 1), _THUMB)
        .unflatten(0, (len(batch.tokens), -1))
        .flatten(1)
    )


def one_by_one(samples: DrivingSamples) -> Iterator[DriveBatch]:
    """The items of a set, as batches of one."""
    for index in range(len(samples)):
        yield collate([samples[0, index]])
