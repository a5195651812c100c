"""What torch is told about the operation."""

from ..runtime.arguments import Arguments
from ..runtime.operation import Operation


def register(arguments: Arguments) -> Operation:
    """Registers the operation with torch. Of the scores the backward pass needs only what became of them."""
    return Operation(
        arguments, __package__, settings="float min_scale, float max_scale, float max_bias",
        results=("probabilities",), saved=("probabilities", "bias", "bias_scale"), by_hand=("torch", "triton"),
        fake_forward=_fake_forward, fake_backward=_fake_backward,
    )  # fmt: skip


def _fake_forward(scores, *others):
    return scores.new_empty(scores.shape)


def _fake_backward(*saved):
    return [tensor.new_empty(tensor.shape) for tensor in saved]
