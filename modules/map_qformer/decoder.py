"""The map decoder: from what the language model says at each query to classes and polylines."""

from dataclasses import dataclass

import torch
from torch import nn

from ..polylines import spread_lines
from ..positions import sinusoidal
from ..settings import Count, Positive

_PRIOR_BIAS = -4.59511985013459  # logit of 1 %, the score of every class before training
_PLACE = 64  # numbers that say where a point is


@dataclass
class DecoderConfig:
    reduce: tuple[Count, ...] = (2048, 1024, 512, 256)  # widths after the language model's
    # How far a round of refinement may move a point, in sides of the range.
    bounds: tuple[Positive, ...] = (0.5, 0.25, 0.125)

    def validate(self) -> None:
        for name in ("reduce", "bounds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, needs at least one number")


@dataclass(frozen=True, eq=False)
class MapOutput:
    """What every round of refinement says."""

    logits: torch.Tensor  # (rounds, B, instances, classes) float32
    points: torch.Tensor  # (rounds, B, instances, points, 2) float32 metres, ego frame


class MapDecoder(nn.Module):
    """Reads instances and points from their tokens, in rounds that move the points less and less.

    Points begin at fixed anchors; a round moves each by at most its bound and knows where it is. The last layers are
    zero before training, and every class has a score of 1 %: nothing begins by collapsing. Computed in float32.

    Args:
        config: see `DecoderConfig`.
        width: of the tokens.
        instances, points, classes: how many.
        line_range: metres ahead and behind together, metres to both sides together.
    """

    def __init__(
        self, config: DecoderConfig, width: int, instances: int, points: int, classes: int,
        line_range: tuple[float, float],
    ):  # fmt: skip
        super().__init__()
        self.bounds = config.bounds
        widths = (width, *config.reduce)
        layers = [nn.LayerNorm(width)]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU()]
        self.reduce = nn.Sequential(*layers)
        self.rounds = nn.ModuleList(_Round(widths[-1], classes) for _ in config.bounds)
        self.register_buffer("sides", torch.tensor(line_range), persistent=False)
        self.register_buffer("anchors", spread_lines(instances, points, line_range))  # metres

    def set_anchors(self, anchors: torch.Tensor) -> None:
        """Lets the points begin elsewhere: (instances, points, 2) metres."""
        if anchors.shape != self.anchors.shape or not bool(anchors.isfinite().all()):
            needed = f"{tuple(self.anchors.shape)} finite numbers: lines, points, x and y"
            raise ValueError(f"anchors have shape {tuple(anchors.shape)}, need {needed}")
        self.anchors.copy_(anchors)

    def forward(self, tokens: torch.Tensor) -> MapOutput:
        """tokens (B, instances · (1 + points), width), instances and their points interleaved."""
        instances, points = self.anchors.shape[:2]
        with torch.autocast(tokens.device.type, enabled=False):
            reduced = self.reduce(tokens.float()).unflatten(1, (instances, 1 + points))
            instance, feature = reduced[:, :, 0], reduced[:, :, 1:]
            place = (self.anchors / self.sides + 0.5).expand(len(tokens), -1, -1, -1)
            logits, places = [], []
            for bound, layer in zip(self.bounds, self.rounds):
                scores, feature, offset = layer(instance, feature, place)
                place = place + bound * offset.tanh()
                logits.append(scores)
                places.append((place - 0.5) * self.sides)
                place = place.detach()
        return MapOutput(torch.stack(logits), torch.stack(places))


class _Round(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.place = nn.Linear(_PLACE, channels)
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(channels, channels)
        self.offset = nn.Linear(channels, 2)
        self.classes = nn.Linear(channels, classes)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        nn.init.constant_(self.classes.bias, _PRIOR_BIAS)

    def forward(self, instance, feature, place):
        """instance (B, I, C), feature (B, I, P, C), place (B, I, P, 2) in [0, 1] of the range."""
        located = feature + instance[:, :, None] + self.place(sinusoidal(place, _PLACE))
        feature = feature + nn.functional.gelu(self.mix(self.norm(located)))
        return self.classes(instance + feature.mean(2)), feature, self.offset(feature)
