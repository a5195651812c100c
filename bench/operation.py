"""What the benchmark of one operation consists of, and the workload that it becomes."""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .floors import traffic_floor
from .workload import MODES, Call, Unavailable, Workload

SCOPE = "operation"
TOOLKIT, PLAIN = "rigfuse", "eager"
COMPILED = ("compile", "flex")  # peers that a compiler has to make first
_LESSER = "lesser"


@dataclass
class Inputs:
    """The arguments of one call, in the order of the functions that take them; `leaves` names those with gradients."""

    arguments: dict[str, Any]
    leaves: tuple[str, ...]
    grad: torch.Tensor  # as large as the result
    flops: int = 0
    read: list[torch.Tensor] | None = None  # what must be read, where that is not all arguments
    jumps: Mapping[str, torch.Tensor] = field(default_factory=dict)  # see `Call`

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

    cases: name → the sizes that `make_inputs` takes. quick: the cases of `--quick`; heavy: by default on a GPU only;
        matter: those worth measuring where there is time for few, by default the first.
    function: the operation on these inputs, which also takes `backend`.
    peers: provider → given the inputs, the function to call with their arguments; raises `Unavailable`. Always there
        are "rigfuse", "eager" (the operation's definition, which stores what it likes) and "compile", the inductor's.
    lesser: providers of less, such as attention without the bias: what the operation would cost without what it adds.
        They compute another function, so they are held to one another; the first is plain PyTorch.
    axis: the size that plots have on their axis.
    shares: given inputs and an architecture, shares of the kernels' work that depend on the values, by name.
    """

    name: str
    cases: Mapping[str, Mapping[str, int]]
    make_inputs: Callable[..., Inputs]
    function: Function
    peers: Mapping[str, Callable[[Inputs], Function]] = field(default_factory=dict)
    quick: tuple[str, ...] = ()
    heavy: tuple[str, ...] = ()
    matter: tuple[str, ...] = ()
    axis: str = "width"
    lesser: Mapping[str, Callable[[Inputs], Function]] = field(default_factory=dict)
    shares: Callable[[Inputs, str], dict[str, float]] | None = None

    @property
    def that_matter(self) -> tuple[str, ...]:
        return self.matter or tuple(self.cases)[:1]

    @property
    def equal(self) -> dict[str, Callable[[Inputs], Function]]:
        """The providers of the operation itself."""
        definition = partial(self.function, backend="definition")
        always = {PLAIN: lambda inputs: definition, TOOLKIT: lambda inputs: self.function}
        return {**always, "compile": compiled(definition), **self.peers}

    @property
    def all_peers(self) -> list[str]:
        """Every provider beside the operation itself in both its forms."""
        return [name for name in self.providers if name not in (PLAIN, TOOLKIT)]

    @property
    def providers(self) -> dict[str, Callable[[Inputs], Function]]:
        return {**self.equal, **self.lesser}


def make_inputs(operation: Operation, case: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The seeded inputs of a case, with gradients wanted for the leaves."""
    generator = torch.Generator().manual_seed(0)
    made = operation.make_inputs(**operation.cases[case], dtype=dtype, device=device, generator=generator)
    for name in made.leaves:
        made.arguments[name].requires_grad_()
    return made


def make_call(made: Inputs, function: Function) -> Call:
    leaves = {name: made.arguments[name] for name in made.leaves}
    return Call(lambda: function(*made.arguments.values()), leaves, made.grad, jumps_at=made.jumps)


def make_workload(
    operation: Operation, case: str, device: torch.device, timed: tuple[str, ...] | None = None
) -> Workload:
    """`timed`: the providers to time, the baseline first; None = all of them."""

    def inputs(dtype):
        return make_inputs(operation, case, dtype, device)

    def call(prepare, dtype):
        made = inputs(dtype)
        return make_call(made, prepare(made))

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
        timed=timed or tuple(providers),
        build=lambda provider, dtype: call(providers[provider], dtype),
        build_reference=lambda group: call(providers[plain[group]], torch.float64),
        floor=floor,
        sizes={operation.axis: operation.cases[case][operation.axis]},
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
