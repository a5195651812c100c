"""Objects as peaks of a map: the target of their centres and its loss (Law & Deng 2018; Zhou et al. 2019)."""

import math

import torch
import torch.nn.functional as F

PRIOR_BIAS = -math.log(99.0)  # of the last layer: before training every class has a probability of 1 %
_LEAST_SIGMA = 0.8  # cells


def add_peaks(target: torch.Tensor, cells: torch.Tensor, labels: torch.Tensor, widths: torch.Tensor) -> None:
    """Writes a bell round each centre into a map, in place; where bells meet, the higher value stays.

    Args:
        target: (classes, rows, columns), 0 … 1.
        cells: (N, 2) whole (u, v) of centres on the map; the bell is 1 there.
        labels: (N,) int64 classes.
        widths: (N,) how wide the objects are, in cells; a standard deviation is a sixth of it, at least 0.8 cells.
    """
    rows, columns = target.shape[1:]
    sigmas = (widths / 6).clamp(min=_LEAST_SIGMA)
    for (u, v), label, sigma in zip(cells.tolist(), labels.tolist(), sigmas.tolist()):
        reach = int(3 * sigma)
        u0, u1, v0, v1 = (
            int(x)
            for x in (max(u - reach, 0), min(u + reach + 1, columns), max(v - reach, 0), min(v + reach + 1, rows))
        )
        x = torch.arange(u0, u1, device=target.device) - u
        y = torch.arange(v0, v1, device=target.device) - v
        bell = torch.exp(-(x.square()[None] + y.square()[:, None]) / (2 * sigma**2))
        part = target[label, v0:v1, u0:u1]
        torch.maximum(part, bell.to(part), out=part)


def peak_loss(logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | bool = True) -> torch.Tensor:
    """Focal loss of a map of centres over their number: a cell counts the less against, the nearer it is to a centre.

    Args:
        logits: floating, get gradients.
        target: the same shape, 1 at centres and less round them, see `add_peaks`.
        known: bool, broadcasts; what is not known does not count. True = all is.
    """
    probability, centre = logits.sigmoid(), target == 1
    right = -((1 - probability) ** 2) * F.logsigmoid(logits) * centre
    wrong = -((1 - target) ** 4) * probability**2 * F.logsigmoid(-logits) * ~centre
    return ((right + wrong) * known).sum() / (centre & known).sum().clamp(min=1)
