"""The public function."""

import torch

from ..runtime.arguments import Argument, Arguments, any_float, boolean
from . import ops

_IMAGE, _ONE_CHANNEL = ("N", "C", "H", "W"), ("N", 1, "H", "W")
ARGUMENTS = Arguments(
    "gated_fusion",
    original=Argument((_IMAGE,), any_float, gradient=True),
    completed=Argument((_IMAGE,), any_float, gradient=True),
    gate_logits=Argument((_IMAGE, _ONE_CHANNEL), any_float, gradient=True),
    fine=Argument((_IMAGE,), any_float, gradient=True, optional=True),
    importance=Argument((_ONE_CHANNEL,), any_float, gradient=True, optional=True),
    missing=Argument((("N",),), boolean, optional=True),
)
OPERATION = ops.register(ARGUMENTS)


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
        backend: None or "auto", "torch", "triton", "definition".

    Returns:
        (N, C, H, W) in `original`'s dtype and memory format.

    Raises:
        ValueError: a shape or device does not fit, or only one of `fine` and `importance` is given.
        TypeError: a dtype is not supported.
        BackendError: the backend asked for cannot serve the call.
    """
    tensors, _ = ARGUMENTS.check(original, completed, gate_logits, fine, importance, missing)
    if (fine is None) != (importance is None):
        given, absent = ("importance", "fine") if fine is None else ("fine", "importance")
        raise ValueError(f"gated_fusion: {given} is given without {absent}; the fine branch needs both")
    return OPERATION(backend, tensors)
