"""Registration with torch, gradients and the choice of backend: the same for every operation.

A forward and a backward op in the namespace `rigfuse`, wrapped in an `autograd.Function` outside the ops: the cheapest
boundary that passes opcheck and full-graph compilation. The Triton backend is imported when it is first called, so
importing rigfuse imports no triton.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from .arguments import Arguments
from .autocast import without_autocast
from .backends import choose_backend
from .nvtx import annotate
from .plans import repeat

_LIBRARY = torch.library.Library("rigfuse", "DEF")


class Operation:
    """One operation, called with the name of a backend, its tensors and its settings.

    `definition.py` and `torch.py` hold a function `forward` that autograd differentiates; `triton.py` holds
    `launch_forward` and, where there are gradients, `launch_backward`, which are called by `plans.repeat`. In
    `by_hand` are the backends whose gradients are written by hand: `launch_backward(grad, *saved, *settings,
    needs_grad)` (in `torch.py` `backward`) returns one gradient, or None, for each argument that may get one.

    arguments: the table of its tensors.
    package: the package that holds the backends.
    settings: the schema of what follows the tensors, such as "float scale, bool nearest".
    results: the names of what `launch_forward` returns; the first alone is differentiable.
    public: how many of them the caller gets.
    saved: the names of the tensors and results that backward takes; by default all, in order.
    fake_forward: from tensors and settings to empty results, with the exact strides.
    fake_backward: from what is saved to empty gradients; None where there are none.
    absent: names that may be None although the public function asks for them, for another function with fewer.
    twice: the backends beside the definition whose gradients autograd can differentiate again.
    """

    def __init__(
        self,
        arguments: Arguments,
        package: str,
        *,
        settings: str = "",
        results: Sequence[str] = ("out",),
        public: int = 1,
        saved: Sequence[str] | None = None,
        fake_forward: Callable,
        fake_backward: Callable | None,
        absent: Sequence[str] = (),
        by_hand: Sequence[str] = ("triton",),
        twice: Sequence[str] = (),
    ):
        self.name, self.package, self.by_hand = arguments.operation, package, by_hand
        # Not when they are called: what torch.compile traces cannot import.
        self.plain = {backend: importlib.import_module(f"{package}.{backend}") for backend in ("definition", "torch")}
        self.once = [backend for backend in ("torch", "triton") if backend not in twice]
        self.public, self.results = public, len(results)
        names = list(arguments.arguments)
        self.tensors = len(names)
        self.many = arguments.arguments[names[0]].many
        self.gradients = [names.index(name) for name in arguments.gradients]
        optional = [name in absent or argument.optional for name, argument in arguments.arguments.items()]
        kinds = {name: "Tensor?" if may_be_absent else "Tensor" for name, may_be_absent in zip(names, optional)}
        if self.many:
            kinds[names[0]] = "Tensor[]"
        saved = (*names, *results) if saved is None else saved
        self.saved = [(*names, *results).index(name) for name in saved]
        self.settings = len(settings.split(",")) if settings else 0
        settings = [settings] if settings else []

        schema = ", ".join([*(f"{kinds[name]} {name}" for name in names), *settings, "str backend"])
        returned = "Tensor" if len(results) == 1 else f"({', '.join('Tensor' for _ in results)})"
        self.forward_op = register(
            f"{self.name}({schema}) -> {returned}", self._forward, lambda *a: fake_forward(*a[:-1])
        )
        self._differentiable = None
        if fake_backward is None:
            return
        schema = ", ".join([*(f"{kinds.get(name, 'Tensor')} {name}" for name in saved), *settings])
        wanted = "bool[]" if self.many else f"bool[{len(self.gradients)}]"
        schema = f"Tensor grad, {schema}, str backend, {wanted} needs_grad"
        count = len(saved)
        self.backward_op = register(
            f"{self.name}_backward({schema}) -> Tensor[]",
            self._backward,
            lambda grad, *a: [g for g, needed in zip(fake_backward(*a[:count]), a[-1]) if needed],
        )
        self._differentiable = _differentiable(self)

    def __call__(self, backend: str | None, tensors: Sequence[torch.Tensor | None], *settings, name: str | None = None):
        """Runs `backend`, or the best one, under the range `name` (by default the operation's).

        Where the operation takes a list, its tensors stand in `tensors` one by one.
        """
        backend = choose_backend(backend, *tensors)
        with annotate(name or self.name):
            if backend in self.by_hand:
                return self._by_hand(tensors, settings, backend)
            if backend in self.once:
                tensors = self._differentiable_once(backend, tensors)
            with without_autocast(tensors[0].device.type):
                return self.plain[backend].forward(*self.packed(tensors, len(tensors)), *settings)

    def _by_hand(self, tensors, settings, backend):
        wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        if wanted and self._differentiable is not None:
            return self._differentiable.apply(*tensors, *settings, backend)
        results = self.forward_op(*self.packed(tensors, len(tensors)), *settings, backend)
        if self.results == 1:
            return results
        return results[0] if self.public == 1 else tuple(results[: self.public])

    def packed(self, arguments: Sequence, tensors: int) -> list:
        """The arguments of an op, of which the first `tensors` are tensors: those of a list as one argument."""
        if not self.many:
            return list(arguments)
        listed = tensors - self.tensors + 1
        return [list(arguments[:listed]), *arguments[listed:]]

    def _forward(self, *arguments):
        *arguments, backend = arguments
        first = arguments[0][0] if self.many else arguments[0]
        with on_device_of(first), without_autocast(first.device.type):
            if backend == "triton":
                return repeat(self._triton.launch_forward, arguments)
            return self.plain[backend].forward(*arguments)

    def _backward(self, grad, *arguments):
        *arguments, backend, needs_grad = arguments
        arguments = [grad, *arguments, needs_grad]
        with annotate(f"{self.name}.backward"), on_device_of(grad), without_autocast(grad.device.type):
            if backend == "triton":
                gradients = repeat(self._triton.launch_backward, arguments)
            else:
                gradients = self.plain[backend].backward(*arguments)
        return [gradient for gradient, needed in zip(gradients, needs_grad) if needed]

    @cached_property
    def _triton(self):
        return importlib.import_module(f"{self.package}.triton")

    def refusal(self, backend: str) -> str:
        """Returns what to tell somebody who asks for a second derivative."""
        return (
            f"{self.name}: backend {backend!r} has no second derivatives; "
            "backend='definition' has those that autograd finds"
        )

    def _differentiable_once(self, backend, tensors):
        """Returns the tensors such that what is differentiated once by autograd refuses to be so again."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return tensors

        def refuse(gradient):
            if torch.is_grad_enabled() and gradient.requires_grad:
                return _Refused.apply(self.refusal(backend), 1, gradient)
            return gradient

        guarded = []
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                tensor = tensor.view_as(tensor)
                tensor.register_hook(refuse)
            guarded.append(tensor)
        return guarded


def register(schema: str, implementation: Callable, fake: Callable):
    """Defines `rigfuse::<schema>` for every device and returns its handle."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rigfuse::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.rigfuse, name).default


def on_device_of(tensor: torch.Tensor):
    """Returns a context manager that makes the tensor's GPU the current one, which is where triton launches."""
    return torch.cuda.device_of(tensor)


class _Refused(torch.autograd.Function):
    """Passes the first `count` tensors on, which may hang on all of them, and raises where they are differentiated."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        passed = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        return passed if count > 1 else passed[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(ctx.message)


def _differentiable(operation: Operation):
    """Returns the `autograd.Function` of an operation whose gradients are written by hand."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            # One by one; a list's are told by how many there are.
            tensors = len(arguments) - operation.settings - 1
            more = tensors - operation.tensors
            results = operation.forward_op(*operation.packed(arguments, tensors))
            results = (results,) if operation.results == 1 else results
            known = (*arguments[:tensors], *results)
            ctx.save_for_backward(*(known[place] for place in _spread(operation.saved, more)))
            ctx.settings, ctx.more = arguments[tensors:], more
            if operation.public == 1:
                return results[0]
            ctx.mark_non_differentiable(*results[1 : operation.public])
            return tuple(results[: operation.public])

        @staticmethod
        def backward(ctx, grad, *others):
            positions = _spread(operation.gradients, ctx.more)
            needs_grad = [ctx.needs_input_grad[position] for position in positions]
            saved = ctx.saved_tensors
            with torch.no_grad():
                packed = operation.packed(saved, len(saved) - len(operation.saved) + operation.tensors)
                computed = operation.backward_op(grad, *packed, *ctx.settings, needs_grad)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                inputs = [tensor for tensor in (grad, *saved) if tensor is not None]
                refused = _Refused.apply(operation.refusal(ctx.settings[-1]), len(computed), *computed, *inputs)
                computed = (refused,) if len(computed) == 1 else refused
            gradients = [None] * len(ctx.needs_input_grad)
            remaining = iter(computed)
            for position, needed in zip(positions, needs_grad):
                if needed:
                    gradients[position] = next(remaining)
            return tuple(gradients)

    return Differentiable


def _spread(positions, more):
    """Positions among arguments whose first is a list of `more` tensors beyond one, when these stand one by one."""
    if not more:
        return positions
    return [*(range(more + 1) if 0 in positions else ()), *(place + more for place in positions if place)]
