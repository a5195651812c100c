"""Allocations that show a write outside a tensor and an element that nobody wrote."""

import torch

BAND = 64  # elements on either side; keeps 16-byte alignment for every dtype


class GuardedAllocations:
    """Patches `torch.empty` and `torch.empty_like`: NaN (or the largest integer) inside and in guard bands around.

    An interpreter writes out of bounds without complaint; here the bands tell.
    """

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._buffers = []
        self._empty, self._empty_strided = torch.empty, torch.empty_strided
        self._layout = torch.empty_like

    def __enter__(self):
        self._monkeypatch.setattr(torch, "empty", self._guarded_empty)
        self._monkeypatch.setattr(torch, "empty_like", self._guarded_empty_like)
        return self

    def __exit__(self, *exception):
        self._monkeypatch.undo()
        if exception[0] is None:
            self.check()

    def check(self):
        for buffer, poison in self._buffers:
            bands = torch.cat([buffer[:BAND], buffer[-BAND:]])
            untouched = bands.isnan() if bands.is_floating_point() else bands == poison
            assert bool(untouched.all()), f"a kernel wrote outside a tensor of {buffer.numel() - 2 * BAND} elements"

    def _guarded(self, model):
        """A poisoned tensor with the shape, strides, dtype and device of `model`."""
        if model.numel() == 0:
            return model
        extent = 1 + sum((size - 1) * stride for size, stride in zip(model.shape, model.stride()))
        poison = float("nan") if model.dtype.is_floating_point else torch.iinfo(model.dtype).max
        buffer = torch.full((extent + 2 * BAND,), poison, dtype=model.dtype, device=model.device)
        self._buffers.append((buffer, poison))
        return buffer.as_strided(model.shape, model.stride(), BAND)

    def _guarded_empty(self, *args, **kwargs):
        return self._guarded(self._empty(*args, **kwargs))

    def _guarded_empty_like(self, tensor, **kwargs):
        return self._guarded(self._layout(tensor, **kwargs))
