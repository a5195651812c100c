"""What is measured: one `Workload` is one case of one subject, and each of its providers turns into a `Call`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

MODES, STEP = ("fwd", "fwd-bwd"), "step"
MODE_NAMES = {"fwd": "forward", "fwd-bwd": "forward + backward", STEP: "one step"}


class Unavailable(Exception):
    """This provider cannot serve this case here; the message says why."""


@dataclass
class Call:
    """One provider's work on one case.

    run: the forward pass; returns the output, or a tuple whose first element is the one that is differentiated.
    leaves: the tensors that get gradients, by name.
    grad: the gradient of the output.
    reset: restores the state that `run` changes; called before each run, untimed.
    capturable: whether a CUDA graph can hold it, or the reason why not.
    jumps: leaves whose gradient jumps where a sampled location crosses from one cell into the next. There rounding
        decides on which side it is, so two right results may differ in a few places by more than rounding.
    jumps_at: for those of whose gradient it is known where it jumps, a mask of its shape: these places are compared
        apart from all others.
    """

    run: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    leaves: Mapping[str, torch.Tensor]
    grad: torch.Tensor
    reset: Callable[[], None] = lambda: None
    capturable: bool | str = True
    jumps: frozenset[str] = frozenset()
    jumps_at: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def forward(self) -> tuple[torch.Tensor, ...]:
        outputs = self.run()
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def step(self, mode: str) -> tuple[torch.Tensor, ...]:
        """What is timed: "fwd" is inference, "fwd-bwd" also computes the gradients of all leaves."""
        if mode == "fwd":
            with torch.no_grad():
                return self.forward()
        output = self.forward()[0]
        return torch.autograd.grad(output, list(self.leaves.values()), self.grad, allow_unused=True)


@dataclass(frozen=True)
class Floor:
    """The least that any implementation must move and compute, for each mode."""

    bytes: Mapping[str, int]
    flops: Mapping[str, int]


@dataclass(frozen=True)
class Workload:
    """One case of one subject.

    build(provider, dtype): the call of a provider, from seeded inputs; raises `Unavailable`.
    build_reference(group): the same mathematics in float64, for the providers of one group.
    groups: provider → the group within which results must be equal.
    plain: group → the provider that is plain PyTorch; the others may err at most twice as much.
    timed: the providers that are checked and timed, the baseline first.
    floor(provider, dtype): the least that must be moved and computed, where that is known.
    sizes: the axes on which this case can be plotted, and its place there.
    keys: provider → cells that one missing camera attends to, before they are pooled.
    modes: those that exist; an operation without gradients has "fwd" only, a training step "step" only.
    """

    subject: str
    scope: str
    case: str
    groups: Mapping[str, str]
    plain: Mapping[str, str]
    timed: tuple[str, ...]
    build: Callable[[str, torch.dtype], Call]
    build_reference: Callable[[str], Call]
    floor: Callable[[str, torch.dtype], Floor] | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
