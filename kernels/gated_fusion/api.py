"""The public function."""

import torch

from ..runtime.backends import choose_backend
from ..runtime.checks import FLOAT_DTYPES, Shapes, check_dtype, check_same_device
from ..runtime.nvtx import annotate

NAME = "gated_fusion"


def gated_fusion(
    original: torch.Tensor,
    completed: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    fine: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    missing: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Blends completed features into the original where the gate opens: `original + sigmoid(gate) · (c − original)`.

    `c` is `completed`, or `completed · (1 − importance) + fine · importance` when a fine branch is given. Memory is
    passed over once forward and once backward. Computed in float32 (float64 if any input is), whatever the dtypes.

    Args:
        original: (N, C, H, W), what the backbone saw. Gets gradients.
        completed: (N, C, H, W), what the completion proposes. Gets gradients.
        gate_logits: (N, C, H, W) or (N, 1, H, W), before the sigmoid. Gets gradients.
        fine: (N, C, H, W), the proposal for important regions; needs `importance`. Gets gradients.
        importance: (N, 1, H, W) in [0, 1]; needs `fine`. Gets gradients.
        missing: (N,) bool; images where it is False return `original` bit for bit. None = every image is fused.
        backend: None or "auto", "torch", "triton".

    Returns:
        (N, C, H, W) in `original`'s dtype and memory format.

    Raises:
        ValueError: a shape or device does not fit, or only one of `fine` and `importance` is given.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    _validate(original, completed, gate_logits, fine, importance, missing)
    arguments = (original, completed, gate_logits, fine, importance, missing)
    if choose_backend(backend, *arguments) == "torch":
        from .torch import gated_fusion as implementation
    else:
        from .ops import gated_fusion as implementation
    with annotate(NAME):
        return implementation(*arguments)


def _validate(original, completed, gate_logits, fine, importance, missing):
    shapes = Shapes(NAME)
    shapes.bind("original", original, "N", "C", "H", "W")
    shapes.bind("completed", completed, "N", "C", "H", "W")
    per_channel = not isinstance(gate_logits, torch.Tensor) or gate_logits.ndim != 4 or gate_logits.shape[1] != 1
    shapes.bind("gate_logits", gate_logits, "N", "C" if per_channel else 1, "H", "W")
    if (fine is None) != (importance is None):
        given, absent = ("importance", "fine") if fine is None else ("fine", "importance")
        raise ValueError(f"{NAME}: {given} is given without {absent}; the fine branch needs both")
    if fine is not None:
        shapes.bind("fine", fine, "N", "C", "H", "W")
        shapes.bind("importance", importance, "N", 1, "H", "W")
    if missing is not None:
        shapes.bind("missing", missing, "N")
    floats = dict(completed=completed, gate_logits=gate_logits, fine=fine, importance=importance)
    for argument, tensor in dict(original=original, **floats).items():
        check_dtype(NAME, argument, tensor, FLOAT_DTYPES)
    check_dtype(NAME, "missing", missing, (torch.bool,))
    check_same_device(NAME, "original", original, **floats, missing=missing)
