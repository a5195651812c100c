"""A moving average of the weights."""

from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of the parameters that train (Polyak averaging).

    After step t an average moves by 1 − min(decay, (1 + t) / (10 + t)) of its distance to the weight, so that the
    first weights are forgotten fast. Buffers are not averaged.

    Args:
        model: its weights are where the averages begin.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        self._averages = [parameter.detach().clone() for parameter in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @contextmanager
    def in_place(self):
        """The model has the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def split(self, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A model's state → (the same with the averages in it, the weights that these replace)."""
        averages = dict(zip(self._names, self._averages))
        return {**weights, **averages}, {name: weights[name] for name in self._names}

    @torch.no_grad()
    def load(self, averages: dict[str, torch.Tensor], updates: int) -> None:
        self.updates = updates
        for name, average in zip(self._names, self._averages):
            average.copy_(averages[name])

    def _swap(self):
        for place, weight in enumerate(self._weights):
            weight.data, self._averages[place] = self._averages[place], weight.data
