"""Calls of the operations in `bench/examples.py`, for the checks that are the same for all of them."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rigfuse.bench.examples import EXAMPLES as EXAMPLES
from rigfuse.bench.examples import Example

_WARP = [f"multi_depth_warp_{name}" for name in ("forward", "backward_target", "backward_features")]
# The kernels that each example launches on a GPU, forward and backward, each under the name of its package.
KERNELS = {
    "multi_depth_warp": _WARP,
    "multi_depth_warp of hypotheses": _WARP,
    "bev_warp": _WARP,
    "cross_camera_attention": [
        f"cross_camera_attention_{name}" for name in ("forward", "backward_query", "transpose_table", "backward_key")
    ],
    "window_attention": [
        f"window_attention_{name}" for name in ("windows", "forward", "backward_query", "backward_key")
    ],
    "window_bias_attention": [
        f"window_bias_attention_{name}"
        for name in ("forward", "merge", "prepare", "backward_query", "reduce_bias", "backward_key")
    ],
    "bias_softmax": ["bias_softmax_forward", "bias_softmax_backward"],
    "gated_fusion": ["gated_fusion_forward", "gated_fusion_backward"],
    "deformable_aggregation": [
        f"deformable_aggregation_{name}" for name in ("forward", "backward_samples", "keys", "backward_maps")
    ],
    "trajectory_importance": ["trajectory_importance_forward"],
}


def tensors_of(example: Example, arguments: dict) -> list[str]:
    """The names of the tensors among `arguments`."""
    return [name for name in example.table.arguments if isinstance(arguments.get(name), torch.Tensor)]


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    """The arguments with every floating-point tensor in `dtype`."""
    is_float = lambda a: isinstance(a, torch.Tensor) and a.is_floating_point()  # noqa: E731
    return {name: a.to(dtype) if is_float(a) else a for name, a in arguments.items()}


def with_leaves(example: Example, arguments: dict, wanted=None) -> tuple[dict, dict]:
    """The arguments with new leaves for those wanted (by default all that get gradients), and these by name."""
    wanted = example.table.gradients if wanted is None else wanted
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted if arguments.get(name) is not None}
    return {**arguments, **leaves}, leaves


def gradient_like(out: torch.Tensor) -> torch.Tensor:
    """A fixed pseudo-random gradient of `out`."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)


def run(example: Example, arguments: dict, *, wanted=None, grad=None, function=None, **options) -> dict:
    """Results and gradients of one call, by name: "out", "out 1", …, "gradient of query", …"""
    arguments, leaves = with_leaves(example, arguments, wanted)
    returned = (function or example.function)(**arguments, **options)
    returned = returned if isinstance(returned, tuple) else (returned,)
    results = {f"out {number}" if number else "out": result.detach() for number, result in enumerate(returned)}
    if leaves:
        grad = gradient_like(returned[0]) if grad is None else grad
        gradients = torch.autograd.grad(returned[0], list(leaves.values()), grad)
        results |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}
    return results


class Recorder(TorchDispatchMode):
    """Notes every call of an op of this package: the op and its arguments."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rigfuse":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@contextmanager
def launched_kernels():
    """A list of the names of the kernels that triton launches meanwhile."""
    from triton.runtime.jit import JITFunction

    names, run = [], JITFunction.run

    def noted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", noted):
        yield names
