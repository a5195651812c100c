"""What the subjects of `--op` have in common."""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...floors import traffic_floor
from ...workload import MODES, Call, Unavailable, Workload

SCOPE = "operation"
TOOLKIT, PLAIN = "rigfuse", "eager"
_LESSER = "lesser"


@dataclass
class Inputs:
    """The arguments of one call, in the order of the functions that take them; `leaves` names those with gradients."""

    arguments: dict[str, Any]
    leaves: tuple[str, ...]
    grad: torch.Tensor  # as large as the result
    flops: int = 0
    read: list[torch.Tensor] | None = None  # what must be read, where that is not all arguments

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def dtype(self) -> torch.dtype:
        return self.grad.dtype


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Operation:
    """An operation, its cases and its peers.

    cases: name → the sizes that `make_inputs` takes. quick: the cases of `--quick`; heavy: by default on a GPU only.
    peers: provider → given the inputs, the function to call with their arguments; raises `Unavailable`. "rigfuse" and
        "eager" are always there.
    lesser: providers of less, such as attention without the bias: what the operation would cost without what it adds.
        They compute another function, so they are held to one another; the first is plain PyTorch.
    axis: the size that plots have on their axis.
    """

    name: str
    cases: Mapping[str, Mapping[str, int]]
    make_inputs: Callable[..., Inputs]
    function: Function
    eager: Function
    peers: Mapping[str, Callable[[Inputs], Function]] = field(default_factory=dict)
    quick: tuple[str, ...] = ()
    heavy: tuple[str, ...] = ()
    axis: str = "width"
    lesser: Mapping[str, Callable[[Inputs], Function]] = field(default_factory=dict)

    @property
    def equal(self) -> dict[str, Callable[[Inputs], Function]]:
        """The providers of the operation itself."""
        always = {PLAIN: lambda inputs: self.eager, TOOLKIT: lambda inputs: self.function}
        return {**always, "compile": compiled(self.eager), **self.peers}

    @property
    def providers(self) -> dict[str, Callable[[Inputs], Function]]:
        return {**self.equal, **self.lesser}


def make_workload(operation: Operation, case: str, device: torch.device) -> Workload:
    sizes = operation.cases[case]

    def inputs(dtype):
        return operation.make_inputs(**sizes, dtype=dtype, device=device, generator=torch.Generator().manual_seed(0))

    def call(prepare, dtype):
        made = inputs(dtype)
        for name in made.leaves:
            made.arguments[name].requires_grad_()
        function = prepare(made)
        leaves = {name: made.arguments[name] for name in made.leaves}
        jumps = frozenset({"offsets"} & leaves.keys())
        return Call(lambda: function(*made.arguments.values()), leaves, made.grad, jumps=jumps)

    def floor(provider, dtype):
        made = inputs(dtype)
        read = made.read or list(made.arguments.values())
        return traffic_floor(read, [made.grad], [made.arguments[name] for name in made.leaves], made.flops)

    providers, plain = operation.providers, {operation.name: PLAIN}
    if operation.lesser:
        plain[_LESSER] = next(iter(operation.lesser))
    return Workload(
        subject=operation.name,
        scope=SCOPE,
        case=case,
        groups=dict.fromkeys(operation.equal, operation.name) | dict.fromkeys(operation.lesser, _LESSER),
        plain=plain,
        timed=tuple(providers),
        build=lambda provider, dtype: call(providers[provider], dtype),
        build_reference=lambda group: call(providers[plain[group]], torch.float64),
        floor=floor,
        sizes={operation.axis: sizes[operation.axis]},
        modes=MODES if inputs(torch.float32).leaves else ("fwd",),
    )


def compiled(function: Function) -> Callable[[Inputs], Function]:
    """A peer: `torch.compile` of a plain formulation."""

    def prepare(inputs):
        if inputs.device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise Unavailable("torch.compile needs a C++ compiler on the CPU")
        torch._dynamo.reset()  # or the graphs of earlier cases count against the limit of recompilations
        return torch.compile(function, dynamic=False)

    return prepare


def require_cuda(inputs: Inputs) -> None:
    if inputs.device.type != "cuda":
        raise Unavailable("needs a CUDA device")


def require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"{name} is not installed")
