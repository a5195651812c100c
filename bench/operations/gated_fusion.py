"""gated_fusion and its peers."""

import torch

from ...kernels import gated_fusion
from ..operation import Inputs, Operation


def make_inputs(images, channels, height, width, *, dtype, device, generator):
    maps = torch.randn(3, images, channels, height, width, generator=generator).to(device, dtype)
    original, completed, grad = (t.contiguous(memory_format=torch.channels_last) for t in maps)
    gate = torch.randn(images, 1, height, width, generator=generator).to(device, dtype)
    arguments = dict(original=original, completed=completed, gate_logits=gate)
    return Inputs(arguments, leaves=tuple(arguments), grad=grad)


OPERATION = Operation(
    name="gated_fusion",
    cases={
        "documents": dict(images=1, channels=256, height=28, width=50),
        "batch-8": dict(images=8, channels=256, height=28, width=50),
        "upstream-fine": dict(images=8, channels=256, height=64, width=176),
        "tiny": dict(images=1, channels=8, height=4, width=6),
    },
    make_inputs=make_inputs,
    function=gated_fusion,
    quick=("documents", "batch-8"),
    matter=("upstream-fine",),
)
