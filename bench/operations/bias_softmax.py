"""bias_softmax and its peers."""

import torch

from ...kernels import bias_softmax
from ..operation import Inputs, Operation

_LIMITS = dict(min_scale=0.5, max_scale=5.0, max_bias=5.0)


def make_inputs(heads, queries, keys, *, dtype, device, generator):
    """Scores of all heads, a bias that the heads share, and a learnable scale."""
    scores, grad = (torch.randn(1, heads, queries, keys, generator=generator).to(device, dtype) for _ in range(2))
    bias = (2 * torch.rand(1, 1, queries, keys, generator=generator) - 1).to(device, dtype)
    scale = torch.tensor(2.5, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = dict(scores=scores, bias=bias, bias_scale=scale)
    return Inputs(arguments, leaves=tuple(arguments), grad=grad)


def toolkit(scores, bias, bias_scale, *, backend=None):
    return bias_softmax(scores, bias, bias_scale, **_LIMITS, backend=backend)


_CMT = dict(heads=8, queries=900, keys=22_384)
OPERATION = Operation(
    name="bias_softmax",
    cases={
        "cmt-sixteenth": {**_CMT, "queries": 225, "keys": 5_596},
        "cmt-quarter": {**_CMT, "keys": 5_596},
        "cmt": _CMT,
        "tiny": dict(heads=2, queries=9, keys=100),
    },
    make_inputs=make_inputs,
    function=toolkit,
    quick=("cmt-sixteenth",),
    matter=("cmt",),
    heavy=("cmt",),
    axis="queries",
)
