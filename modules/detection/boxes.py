"""Boxes: the classes, how a network encodes them, what it predicts, and the selection of detections."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.runtime.checks import FLOAT_DTYPES, Shapes, check_dtype, check_same_device
from ..maps_layout import range_bounds

DETECTION_CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)


@dataclass
class Predictions:
    """What every decoder layer predicts for every query."""

    logits: torch.Tensor  # (layers, B, N, classes) float32
    boxes: torch.Tensor  # (layers, B, N, 10) float32, encoded, metres in the ego frame


@dataclass
class Detections:
    """The boxes found in one sample, best first."""

    boxes: torch.Tensor  # (K, 9) float32: x, y, z, length, width, height, yaw, vx, vy
    scores: torch.Tensor  # (K,) float32 in (0, 1]
    labels: torch.Tensor  # (K,) int64, indices into DETECTION_CLASSES


def encode_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Encodes boxes as a network regresses them: sizes by logarithm, the yaw by sine and cosine (Yin et al. 2021).

    Args:
        boxes: (…, 9) floating: x, y, z of the centre, length, width, height (metres), yaw (rad), vx, vy (m/s).

    Returns:
        (…, 10) of the same dtype: x, y, z, log length, log width, log height, sin yaw, cos yaw, vx, vy. NaN stays NaN;
        a size that is not positive becomes −inf or NaN. Gradients pass.
    """
    _check_last("encode_boxes", "boxes", boxes, 9)
    yaw = boxes[..., 6:7]
    return torch.cat([boxes[..., :3], boxes[..., 3:6].log(), yaw.sin(), yaw.cos(), boxes[..., 7:]], dim=-1)


def decode_boxes(code: torch.Tensor) -> torch.Tensor:
    """Inverts `encode_boxes`: (…, 10) → (…, 9), yaw in [−π, π]. Sine and cosine need not be normalised."""
    _check_last("decode_boxes", "code", code, 10)
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., :3], code[..., 3:6].exp(), yaw, code[..., 8:]], dim=-1)


def move_boxes(boxes: torch.Tensor, other_T_frame: torch.Tensor) -> torch.Tensor:
    """Brings boxes (…, 9), as `decode_boxes` gives them, into another frame by a rigid transform (4, 4) of any dtype.
    Gradients to the boxes pass."""
    turn, shift = other_T_frame[:3, :3].to(boxes), other_T_frame[:3, 3].to(boxes)
    centre, size, yaw, velocity = boxes.split((3, 3, 1, 2), dim=-1)
    heading = torch.cat([yaw.cos(), yaw.sin()], dim=-1) @ turn[:2, :2].T
    yaw = torch.atan2(heading[..., 1:], heading[..., :1])
    return torch.cat([centre @ turn.T + shift, size, yaw, velocity @ turn[:2, :2].T], dim=-1)


@torch.no_grad()
def decode(
    predictions: Predictions,
    *,
    top: int = 300,
    post_range: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
) -> list[Detections]:
    """Selects the detections of the last decoder layer, for each sample of the batch; no gradients.

    Of all pairs of query and class the `top` best scores are taken (a query may appear with several classes). Of these
    are dropped: centres outside `post_range` (metres, ego frame), boxes that are not finite, logits that are NaN.
    Of equal logits the earlier query wins, then the earlier class: the result is the same on every run.
    """
    low, high = range_bounds("decode: post_range", post_range, predictions.boxes.device)
    logits, boxes = predictions.logits[-1], decode_boxes(predictions.boxes[-1])
    classes = logits.shape[-1]
    # Sorted before the sigmoid, which is 1 for everything above 17. A logit that is NaN comes last, with score 0.
    logits, index = logits.flatten(1).nan_to_num(nan=-math.inf).sort(dim=1, descending=True, stable=True)
    detections = []
    for box, score, pair in zip(boxes, logits[:, :top].sigmoid(), index[:, :top]):
        box = box[pair // classes]
        center = box[:, :3]
        keep = ((center >= low) & (center <= high)).all(dim=1) & box.isfinite().all(dim=1) & (score > 0)
        detections.append(Detections(box[keep], score[keep], pair[keep] % classes))
    return detections


def check_ground_truth(caller: str, boxes: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> None:
    """Raises unless each of one or more samples has boxes (G, 9) of floats and labels (G,) of int64, on one device."""
    if not len(boxes) == len(labels) > 0:
        got = f"boxes are of {len(boxes)} samples and labels of {len(labels)}"
        raise ValueError(f"{caller}: {got}, needs the same number, at least 1")
    for i, (box, label) in enumerate(zip(boxes, labels)):
        shapes = Shapes(caller)
        shapes.bind(f"boxes[{i}]", box, "G", 9)
        shapes.bind(f"labels[{i}]", label, "G")
        check_dtype(caller, f"boxes[{i}]", box, FLOAT_DTYPES)
        check_dtype(caller, f"labels[{i}]", label, (torch.int64,))
        check_same_device(caller, f"boxes[{i}]", box, **{f"labels[{i}]": label})


def _check_last(caller, argument, tensor, size):
    if tensor.ndim == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{caller}: {argument} has shape {tuple(tensor.shape)}, needs (…, {size})")
