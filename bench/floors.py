"""The floor of a call: the least bytes over the bandwidth, or the least FLOPs over the rate, whichever is longer."""

import time
from dataclasses import dataclass

import torch

from .workload import Floor

_REPEATS = 10


@dataclass(frozen=True)
class Machine:
    """What this device was measured to do."""

    bytes_per_second: float  # a copy, read and write both counted
    flops_per_second: float  # a square matrix product in the dtype of the run

    def floor_ms(self, floor: Floor, mode: str) -> float:
        return 1e3 * max(floor.bytes[mode] / self.bytes_per_second, floor.flops[mode] / self.flops_per_second)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of a few copies and matrix products; well under a second."""
    on_gpu = device.type == "cuda"
    # Random bits: a GPU multiplies ones faster than data, for they draw less power.
    source = torch.randint(256, ((1 << 30) if on_gpu else (1 << 26),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    n = 8192 if on_gpu else (1024 if dtype == torch.float32 else 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = _best_seconds(lambda: a @ b, device)
    return Machine(2 * source.numel() / copy, 2 * n**3 / product)


def _best_seconds(function, device):
    best = float("inf")
    for _ in range(_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def size_in_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def traffic_floor(inputs, outputs, differentiated, flops: int = 0) -> Floor:
    """Everything read once and written once.

    The backward pass reads the inputs and the output's gradient and writes the gradients; it computes twice what the
    forward pass does.
    """
    forward = size_in_bytes(*inputs, *outputs)
    backward = size_in_bytes(*inputs, *outputs[:1], *differentiated)
    return Floor({"fwd": forward, "fwd-bwd": forward + backward}, {"fwd": flops, "fwd-bwd": 3 * flops})
