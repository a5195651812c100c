"""From the decoder's states to boxes: the task heads, the box code, and the selection of detections."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.runtime.checks import FLOAT_DTYPES, Shapes, check_dtype, check_same_device

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
_PRIOR = 0.01  # score of every class before training
_REFERENCE_EPS = 1e-5  # a reference on the edge of the range can still move


@dataclass
class Predictions:
    """What every decoder layer says of every query."""

    logits: torch.Tensor  # (layers, B, N, classes) float32
    boxes: torch.Tensor  # (layers, B, N, 10) float32, encoded, metres in the ego frame


@dataclass
class Detections:
    """The boxes found in one sample, best first."""

    boxes: torch.Tensor  # (K, 9) float32: x, y, z, length, width, height, yaw, vx, vy
    scores: torch.Tensor  # (K,) float32 in (0, 1]
    labels: torch.Tensor  # (K,) int64, indices into DETECTION_CLASSES


def encode_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes as the network regresses them: sizes by logarithm, the yaw by sine and cosine (Yin et al. 2021).

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
    """Inverse of `encode_boxes`: (…, 10) → (…, 9), yaw in [−π, π]. Sine and cosine need not be normalised."""
    _check_last("decode_boxes", "code", code, 10)
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., :3], code[..., 3:6].exp(), yaw, code[..., 8:]], dim=-1)


class TaskHeads(nn.Module):
    """Small MLPs over the decoder's states, one for each task and each layer (CMT: Yan et al. 2023).

    The layers have weights of their own but run together, each product a batched one over the layers.

    Args:
        channels: C of the states.
        classes: number of classes.
        layers: number of decoder layers.
        hidden: width of the MLPs.
    """

    def __init__(
        self, channels: int = 256, classes: int = len(DETECTION_CLASSES), layers: int = 6, *, hidden: int = 64
    ):
        super().__init__()
        self.channels, self.layers = channels, layers
        sizes = dict(center=2, height=1, dim=3, rot=2, vel=2, logits=classes)
        self.tasks = nn.ModuleDict({name: _LayerMLPs(layers, channels, hidden, out) for name, out in sizes.items()})
        nn.init.constant_(self.tasks["logits"].bias_out, math.log(_PRIOR / (1 - _PRIOR)))

    def forward(
        self,
        states: torch.Tensor,
        reference: torch.Tensor,
        point_range: tuple[float, float, float, float, float, float],
    ) -> Predictions:
        """Predicts a box and class logits for each query; in float32, under autocast too.

        Args:
            states: (layers, B, N, C) floating, the output of each decoder layer; gets gradients.
            reference: (B, N, 3) floating, reference points in [0, 1] of `point_range`; gets gradients.
            point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres, ego frame. Every centre lies inside: it is
                sigmoid(logit(reference) + what the heads say), scaled to the range.
        """
        shapes = Shapes("TaskHeads", layers=self.layers, C=self.channels)
        _, batch, queries, _ = shapes.bind("states", states, "layers", "B", "N", "C")
        shapes.bind("reference", reference, "B", "N", 3)
        low, high = range_bounds("TaskHeads: point_range", point_range, states.device)
        with torch.autocast(states.device.type, enabled=False):
            states = states.float().flatten(1, 2)  # (layers, B·N, C)
            out = {name: task(states).unflatten(1, (batch, queries)) for name, task in self.tasks.items()}
            offset = torch.cat([out["center"], out["height"]], dim=-1)
            center = low + (high - low) * torch.sigmoid(torch.logit(reference.float(), eps=_REFERENCE_EPS) + offset)
            boxes = torch.cat([center, out["dim"], out["rot"], out["vel"]], dim=-1)
        return Predictions(out["logits"], boxes)


class _LayerMLPs(nn.Module):
    """Linear, layer norm, ReLU, linear: (layers, M, C) → (layers, M, out), each layer with its own weights."""

    def __init__(self, layers: int, channels: int, hidden: int, out: int):
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(layers, channels, hidden))
        self.norm_scale = nn.Parameter(torch.ones(layers, 1, hidden))
        self.norm_shift = nn.Parameter(torch.zeros(layers, 1, hidden))
        self.weight_out = nn.Parameter(torch.empty(layers, hidden, out))
        self.bias_out = nn.Parameter(torch.zeros(layers, 1, out))
        for weight in (self.weight_in, self.weight_out):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        hidden = F.layer_norm(torch.bmm(states, self.weight_in), self.norm_scale.shape[-1:])
        hidden = F.relu(hidden * self.norm_scale + self.norm_shift)
        return torch.baddbmm(self.bias_out, hidden, self.weight_out)


@torch.no_grad()
def decode(
    predictions: Predictions,
    *,
    top: int = 300,
    post_range: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
) -> list[Detections]:
    """The detections of the last decoder layer, for each sample of the batch; no gradients.

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


def range_bounds(name: str, bounds: Sequence[float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest corner of a range in metres, (3,) float32 each; `name` is for the error message."""
    if len(bounds) != 6 or not all(low < high for low, high in zip(bounds[:3], bounds[3:])):
        needed = "(x_min, y_min, z_min, x_max, y_max, z_max), each minimum below its maximum"
        raise ValueError(f"{name} is {tuple(bounds)}, needs {needed}")
    low, high = torch.tensor(bounds, dtype=torch.float32, device=device).split(3)
    return low, high


def check_ground_truth(caller: str, boxes: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> None:
    """Raises unless there is a (G, 9) of floats and a (G,) of int64 on one device for each of one or more samples."""
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
