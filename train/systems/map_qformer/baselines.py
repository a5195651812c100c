"""The rival of a map network that looks at nothing: one map for every place, made of the training split."""

from collections.abc import Iterable

import numpy as np
import torch

from ....modules.clusters import kmeans
from ...metrics.map import MapMetric, chamfer_distances, resample
from .anchors import training_lines
from .data import MapBatch, MapSamples
from .experiment import add, figures_of

_NEAR = 1.5  # metres within which a line of the mean map is there
_COUNTS = (1, 2, 4, 8, 16)  # lines of a class that are tried


class MeanMap:
    """The same lines for every sample: for each class the centres of the training split's lines.

    A line's score is the share of the training samples in which one of its class lies within 1.5 m of it. Of several
    numbers of lines a class, the one with the highest mAP on the training split itself is taken.

    Args:
        samples: the training set.
        seed: of the k-means.
    """

    def __init__(self, samples: MapSamples, seed: int = 0):
        self.classes = samples.model.classes
        lines, labels = training_lines(samples)
        truths = [samples.lines(place) for place in range(len(samples.places))]
        tried = []
        for count in _COUNTS:
            self.lines, self.labels, self.scores = self._made(lines, labels, truths, count, seed)
            metric = MapMetric(self.classes)
            for place, truth in enumerate(truths):
                found = self.lines, self.labels, self.scores
                metric.add(str(place), *found, truth.lines[0][:, 0], truth.labels[0])
            tried.append((metric.compute()["mAP"] or 0.0, -count, found))
        _, _, (self.lines, self.labels, self.scores) = max(tried, key=lambda each: each[:2])

    def _made(self, lines, labels, truths, count, seed):
        centres, names, scores = [], [], []
        for label in range(len(self.classes)):
            own = lines[labels == label].flatten(1)
            number = min(count, len(torch.unique(own, dim=0)))
            if not number:
                continue
            for centre in kmeans(own, number, seed).unflatten(1, lines.shape[1:]):
                near = [_near(centre, truth.lines[0][truth.labels[0] == label, 0]) for truth in truths]
                centres.append(centre)
                names.append(label)
                scores.append(sum(near) / len(near))
        return torch.stack(centres), torch.tensor(names), torch.tensor(scores)

    def evaluate(self, batches: Iterable[MapBatch]) -> dict[str, float]:
        """The figures of `MapExperiment.evaluate`."""
        metric = MapMetric(self.classes)
        for batch in batches:
            for index, token in enumerate(batch.tokens):
                add(metric, token, self.lines, self.labels, self.scores, batch, index)
        return figures_of(metric)


def _near(centre, lines):
    """Whether one of some lines lies near."""
    if not len(lines):
        return False
    others = np.stack([resample(line, 50) for line in lines])
    return bool((chamfer_distances(resample(centre, 50)[None], others, _NEAR) <= _NEAR).any())
