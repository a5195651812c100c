"""Buffers that a training step moves, as batch norms move their statistics: remembered, watched, put back."""

import math

import torch
from torch import nn


class Buffers:
    """Those of a model's modules that are in training.

    `remember` before a step and `restore` after one that does not count; `sound` tells whether the step has left a
    NaN or an infinity where there was none.

    Args:
        model: in the mode in which it will train.
    """

    def __init__(self, model: nn.Module):
        modules = [module for module in model.modules() if module.training]
        self._places = [(m, name) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        self._kept = self._was_finite = None

    def remember(self) -> None:
        live = self._live()
        if self._kept is None or any(a.shape != b.shape for a, b in zip(self._kept, live)):
            self._kept = [buffer.clone() for buffer in live]
            self._was_finite = _finite(self._kept)
            return
        for floating in (True, False):  # one launch for each, not one for each buffer
            pairs = [(k, b) for k, b in zip(self._kept, live) if b.is_floating_point() == floating]
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs)))

    def sound(self) -> torch.Tensor:
        """() bool."""
        return (_finite(self._live()) | ~self._was_finite).all()

    def restore(self) -> None:
        for (module, name), buffer, kept in zip(self._places, self._live(), self._kept):
            if buffer.shape == kept.shape:
                buffer.copy_(kept)
            else:
                setattr(module, name, kept.clone())

    def _live(self):
        return [getattr(module, name).detach() for module, name in self._places]


def _finite(buffers):
    """(N) bool, one for each that holds floating-point values."""
    values = [buffer for buffer in buffers if buffer.is_floating_point() and buffer.numel()]
    largest = [norm.float() for norm in torch._foreach_norm(values, math.inf)] if values else [torch.zeros(())]
    return torch.stack(largest).isfinite()
