"""Correctness first: each provider against the same mathematics in float64. A wrong result gets no speed."""

from dataclasses import dataclass

import torch

from .workload import Call

# Relative error (2-norm over a tensor) beyond which even plain PyTorch is taken to be wrong. Half precision is that
# poor for the gradients of offsets, which are differences of neighbouring cells behind a softmax.
CEILING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


@dataclass(frozen=True)
class Result:
    """What a call computed, in float64: its outputs, and its gradients by name. `jumps`: see `Call`."""

    outputs: list[torch.Tensor]
    grads: dict[str, torch.Tensor]
    jumps: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Errors:
    """Relative errors by name: "output", "output 1", …, and those of the gradients."""

    outputs: dict[str, float]
    grads: dict[str, float]
    jumps: frozenset[str] = frozenset()

    @property
    def worst(self) -> float:
        """Of all tensors whose gradient does not jump."""
        return max([*self.outputs.values(), self.worst_gradient])

    @property
    def worst_gradient(self) -> float:
        """Of those that do not jump; 0 where there are none."""
        return max((error for name, error in self.grads.items() if name not in self.jumps), default=0.0)

    @property
    def tensors(self) -> dict[str, float]:
        return {**self.outputs, **{f"gradient of {name}": error for name, error in self.grads.items()}}

    def excess(self, dtype: torch.dtype, plain: "Errors | None") -> str:
        """What is wrong, in words; empty where no tensor is further off than `plain`, PyTorch in `dtype`, allows."""
        jumps = {f"gradient of {name}" for name in self.jumps}
        for name, error in self.tensors.items():
            if plain is None or name in jumps:
                limit = CEILING[dtype]
            else:  # of many gradients one errs more than twice as much by chance; none may err more than plain's worst
                worst = 0.0 if name in self.outputs else plain.worst_gradient
                limit = allowed(dtype, max(plain.tensors[name], worst / 2))
            if not error <= limit:
                return f"relative error {error:.1e} of the {name}, allowed {limit:.1e}"
        return ""


def compute(call: Call, modes: tuple[str, ...]) -> Result:
    differentiated = any(mode != "fwd" for mode in modes)
    call.reset()
    with torch.set_grad_enabled(differentiated):
        outputs = call.forward()
    grads = {}
    if differentiated:
        # A bias's gradient is a sum that may cancel, down to nothing for a key's; the weights' gradients show the same.
        leaves = {name: leaf for name, leaf in call.leaves.items() if leaf.ndim > 1}
        computed = torch.autograd.grad(outputs[0], list(leaves.values()), call.grad, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), computed):
            grads[name] = (torch.zeros_like(leaf) if grad is None else grad).double()
    jumps = call.jumps
    for name, places in call.jumps_at.items():
        if name in grads:
            apart = f"{name} where it jumps"
            grads[apart], grads[name] = grads[name].where(places, 0), grads[name].where(~places, 0)
            jumps |= {apart}
    return Result([output.detach().double() for output in outputs], grads, jumps)


def repeats(result: Result, again: Result, mode: str) -> bool:
    """Whether both have the same bits: outputs in mode "fwd", gradients otherwise, or losses where there are none."""
    if mode == "fwd" or not result.grads:
        return all(map(torch.equal, result.outputs, again.outputs))
    return all(torch.equal(grad, again.grads[name]) for name, grad in result.grads.items())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual − expected| / |expected| in the 2-norm; infinite when a value is not finite or a shape differs."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    error = float(torch.linalg.vector_norm(actual - expected))
    scale = float(torch.linalg.vector_norm(expected))
    return error / scale if scale > 0 else error


def errors(actual: Result, expected: Result) -> Errors:
    outputs = {
        f"output {number}" if number else "output": relative_error(a, e)
        for number, (a, e) in enumerate(zip(actual.outputs, expected.outputs))
    }
    grads = {name: relative_error(actual.grads[name], e) for name, e in expected.grads.items()}
    return Errors(outputs, grads, actual.jumps)


def allowed(dtype: torch.dtype, plain_error: float) -> float:
    """Twice what plain PyTorch errs, plus rounding; never more than the ceiling."""
    return min(CEILING[dtype], 2 * plain_error + 8 * torch.finfo(dtype).eps)
