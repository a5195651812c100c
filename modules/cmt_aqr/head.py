"""The task heads: from the decoder's states to encoded boxes and class logits."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.runtime.checks import Shapes
from ..detection.boxes import DETECTION_CLASSES, Predictions
from ..maps_layout import range_bounds
from .encodings import inverse_sigmoid

BoxCode = Literal["metric", "cmt"]
_NORM_EPS = 1e-6


class TaskHeads(nn.Module):
    """Small MLPs over the decoder's states, one for each task and each layer (CMT: Yan et al. 2023).

    The layers have weights of their own but run together, each product a batched one over the layers.

    With the box code "cmt", heads mean what they mean upstream, whatever they are called: `height`, bounded by the
    range of z, is the logarithm of the width, `dim` is log length, z of the centre, log height, and `rot` sine and
    cosine of −yaw − π/2. So the width is bound to where the query is, and z is not; "metric" has what the names say.

    Args:
        channels: C of the states.
        layers: number of decoder layers.
        classes: number of classes.
        hidden: width of the MLPs.
        box_code: "metric" or "cmt".
        prior: score of every class before training.
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        classes: int = len(DETECTION_CLASSES),
        hidden: int = 64,
        box_code: BoxCode = "metric",
        prior: float = 0.01,
    ):
        super().__init__()
        self.channels, self.layers, self.box_code = channels, layers, box_code
        sizes = dict(center=2, height=1, dim=3, rot=2, vel=2, logits=classes)
        self.tasks = nn.ModuleDict({name: _LayerMLPs(layers, channels, hidden, out) for name, out in sizes.items()})
        nn.init.constant_(self.tasks["logits"].bias_out, math.log(prior / (1 - prior)))

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
                sigmoid(logit(reference) + what the heads say), scaled to the range; with "cmt" only its x and y.
        """
        shapes = Shapes("TaskHeads", layers=self.layers, C=self.channels)
        _, batch, queries, _ = shapes.bind("states", states, "layers", "B", "N", "C")
        shapes.bind("reference", reference, "B", "N", 3)
        low, high = range_bounds("TaskHeads: point_range", point_range, states.device)
        with torch.autocast(states.device.type, enabled=False):
            states = states.float().flatten(1, 2)  # (layers, B·N, C)
            out = {name: task(states).unflatten(1, (batch, queries)) for name, task in self.tasks.items()}
            offset = torch.cat([out["center"], out["height"]], dim=-1)
            place = low + (high - low) * torch.sigmoid(inverse_sigmoid(reference.float()) + offset)
            dim, rot = out["dim"], out["rot"]
            if self.box_code == "cmt":
                log_width, (log_length, z, log_height) = place[..., 2:], dim.split(1, dim=-1)
                place = torch.cat([place[..., :2], z], dim=-1)
                dim, rot = torch.cat([log_length, log_width, log_height], dim=-1), -rot.flip(-1)
            boxes = torch.cat([place, dim, rot, out["vel"]], dim=-1)
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
        hidden = F.layer_norm(torch.bmm(states, self.weight_in), self.norm_scale.shape[-1:], eps=_NORM_EPS)
        hidden = F.relu(hidden * self.norm_scale + self.norm_shift)
        return torch.baddbmm(self.bias_out, hidden, self.weight_out)
