"""Set prediction losses of the detector: who is matched to what, and what that costs."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...kernels.runtime.checks import Shapes, check_indices, check_same_device
from ...kernels.runtime.extras import optional
from .boxes import Predictions, check_ground_truth, encode_boxes
from .denoising import BACKGROUND, Denoising

optimize = optional("modules", "scipy.optimize")

CODE_WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)  # of the ten numbers of an encoded box
_VELOCITY = 8  # the first of them that may be unknown
_CLASS_COST, _BOX_COST = 2.0, 0.25
_NEGATIVE = 0.1  # what an unmatched query adds to the divisor of the classification loss; a matched one adds 1
_LARGEST_COST, _IMPOSSIBLE = 1e5, 1e9  # a pair that is impossible loses to any number of pairs that are not


def focal_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Computes the sigmoid focal loss (Lin et al. 2017) of each element, α = 0.25, γ = 2; exact for any logits.

    logits: floating, get gradients. target: bool, of a shape that broadcasts with it.
    """
    return torch.where(target, _focal(-logits, 0.25), _focal(logits, 0.75))


@torch.no_grad()
def match(
    logits: torch.Tensor, boxes: torch.Tensor, gt_boxes: torch.Tensor, gt_labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assigns ground truth to queries with the least total cost (Carion et al. 2020); no gradients.

    A pair costs 2.0 × what it adds to the classification loss + 0.25 × its box loss without the velocity, which is the
    last to be learned (see `detection_losses`). A pair whose cost is not finite is never matched; then, or with fewer
    queries than boxes, some boxes stay without a query.

    Args:
        logits: (N, classes) floating.
        boxes: (N, 10) floating, encoded.
        gt_boxes: (G, 9) floating, as `encode_boxes` takes them; an unknown velocity is NaN.
        gt_labels: (G,) int64.

    Returns:
        indices of queries, ascending, and of their ground truth: (M,) int64 each, on the device of `logits`.
    """
    check_ground_truth("match", [gt_boxes], [gt_labels])
    shapes = Shapes("match")
    classes = shapes.bind("logits", logits, "N", "classes")[1]
    shapes.bind("boxes", boxes, "N", 10)
    check_indices("match", "gt_labels", gt_labels, 0, classes)
    query, gt = _assign(_costs(logits, boxes, encode_boxes(gt_boxes), gt_labels))
    return query.to(logits.device), gt.to(logits.device)


def detection_losses(
    predictions: Predictions,
    boxes: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    denoising: Denoising | None = None,
) -> dict[str, torch.Tensor]:
    """Computes the losses of all decoder layers (CMT: Yan et al. 2023), each layer matched on its own.

    `cls`: focal loss over all matching queries and classes; unmatched queries are background. It is divided by the
    matched queries + 0.1 × the others. `box`: L1 between the encoded boxes of matched pairs, weighted by CODE_WEIGHTS,
    divided by the number of ground truths; an unknown velocity (NaN) contributes nothing, the rest of its box does
    (upstream leaves out the whole box). Every divisor is at least 1, and of this batch; in a distributed run that is
    the rank's own batch. `dn_cls`, `dn_box`: the same for the denoising queries, whose targets are known, divided by
    the number of those that may be expected to keep their class, and of all those that are valid; those that became
    background regress their box too.

    Args:
        predictions: of P denoising queries, then N matching queries; gets gradients.
        boxes: for each sample (G, 9) floating; boxes that are not finite stay without a query.
        labels: for each sample (G,) int64.
        denoising: what the first P queries are to become; None = there are none.

    Returns:
        Unweighted scalars summed over the layers, always all four: zero with a graph where there is nothing to learn,
        and NaN for `box` where no predicted box is finite.
        Forward and backward are elementwise but for sums: repeatable bit for bit.
    """
    return {name: loss.sum() for name, loss in layer_losses(predictions, boxes, labels, denoising).items()}


def layer_losses(
    predictions: Predictions,
    boxes: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    denoising: Denoising | None = None,
) -> dict[str, torch.Tensor]:
    """Computes the losses of every decoder layer, (layers,) each; see `detection_losses`."""
    _check_losses(predictions, boxes, labels, denoising)
    padding = denoising.reference.shape[1] if denoising else 0
    known_logits, logits = predictions.logits.tensor_split([padding], dim=2)
    known_boxes, predicted = predictions.boxes.tensor_split([padding], dim=2)

    count = max(sum(map(len, boxes)), 1)
    target, label = _matched_targets(logits, predicted, boxes, labels)
    classification = _sum(focal_loss(logits, _one_hot(label, logits.shape[-1])))
    matched = label != BACKGROUND
    regression = _sum(torch.where(matched, _box_error(predicted, target), 0))
    divisor = (_sum(matched) + _NEGATIVE * _sum(~matched)).clamp(min=1)
    # A network that diverged has no small loss.
    lost = ~predicted.isfinite().all(dim=-1).any() & (predicted.numel() > 0)
    losses = dict(cls=classification / divisor, box=torch.where(lost, torch.nan, regression / count))
    if denoising is None:
        return losses | dict(dn_cls=_sum(known_logits), dn_box=_sum(known_boxes))

    valid, label = denoising.valid, denoising.labels
    classification = focal_loss(known_logits, _one_hot(label, logits.shape[-1]))
    classification = _sum(torch.where(valid[..., None], classification, 0))
    regression = _sum(torch.where(valid, _box_error(known_boxes, encode_boxes(denoising.boxes)), 0))
    count = valid.sum()
    return losses | dict(
        dn_cls=classification / (count * denoising.kept).clamp(min=1), dn_box=regression / count.clamp(min=1)
    )


def _sum(values):
    """The sum of each layer."""
    return values.flatten(1).sum(1)


def _focal(wrong, alpha):
    """The focal loss of an element whose wrong answer has the logit `wrong`, times α."""
    return alpha * wrong.sigmoid().square() * F.softplus(wrong)


def _one_hot(labels, classes):
    return labels[..., None] == torch.arange(classes, device=labels.device)


def _box_error(predicted, target):
    """The weighted L1 distance (…) of encoded boxes (…, 10) each, or of their first numbers; a velocity that is not
    known does not count."""
    size = target.shape[-1]
    known = target.isfinite() | (torch.arange(size, device=target.device) < _VELOCITY)
    return (torch.where(known, predicted - target, 0).abs() * predicted.new_tensor(CODE_WEIGHTS[:size])).sum(dim=-1)


def _costs(logits, boxes, targets, labels):
    """The cost (…, N, G) of every pair: logits (…, N, classes), boxes (…, N, 10), targets (G, 10) and labels (G,)."""
    logits = logits.index_select(-1, labels)
    classification = _focal(-logits, 0.25) - _focal(logits, 0.75)
    boxes, targets = boxes[..., None, :_VELOCITY], targets[..., :_VELOCITY]
    return _CLASS_COST * classification + _BOX_COST * _box_error(boxes, targets)


def _assign(cost):
    """The pairs of the least total cost (N, G): indices of queries and of ground truth on the CPU."""
    cost = cost.double().cpu().numpy()
    possible = np.isfinite(cost)
    query, gt = optimize.linear_sum_assignment(
        np.where(possible, cost.clip(-_LARGEST_COST, _LARGEST_COST), _IMPOSSIBLE)
    )
    keep = possible[query, gt]
    return torch.from_numpy(query[keep]), torch.from_numpy(gt[keep])


@torch.no_grad()
def _matched_targets(logits, predicted, boxes, labels):
    """What each query is to become: encoded boxes (layers, B, N, 10) and labels (layers, B, N); zeros and BACKGROUND
    where it is unmatched."""
    rows = torch.full(logits.shape[:3], -1)  # into all ground truth of the batch; −1, the last row, is background
    targets = [encode_boxes(box) for box in boxes]
    first = 0
    for sample, (target, label) in enumerate(zip(targets, labels)):
        costs = _costs(logits[:, sample], predicted[:, sample], target, label).cpu()
        for layer, cost in enumerate(costs):
            query, gt = _assign(cost)
            rows[layer, sample, query] = first + gt
        first += len(label)
    rows = rows.to(logits.device)
    target = torch.cat([*targets, targets[0].new_zeros(1, 10)])
    label = torch.cat([*labels, labels[0].new_full((1,), BACKGROUND)])
    return target[rows], label[rows]


def _check_losses(predictions, boxes, labels, denoising):
    caller = "detection_losses"
    check_ground_truth(caller, boxes, labels)
    shapes = Shapes(caller, B=len(boxes))
    classes = shapes.bind("predictions.logits", predictions.logits, "layers", "B", "queries", "classes")[3]
    queries = shapes.bind("predictions.boxes", predictions.boxes, "layers", "B", "queries", 10)[2]
    for i, label in enumerate(labels):
        check_indices(caller, f"labels[{i}]", label, 0, classes)
        check_same_device(caller, "predictions.logits", predictions.logits, **{f"labels[{i}]": label})
    if denoising is not None:
        shapes.bind("denoising.valid", denoising.valid, "B", "P")
        if len(denoising.mask) != queries:
            raise ValueError(f"{caller}: predictions has {queries} queries, needs {len(denoising.mask)} like denoising")
