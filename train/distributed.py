"""One process or many: the same calls work in both."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(timeout: float = 600.0, device: str | None = None):
    """The ranks that torchrun started (NCCL on GPUs, gloo on CPUs), or this process alone.

    Args:
        timeout: seconds a rank waits for the others.
        device: "cpu" or "cuda"; None = CUDA where there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if "RANK" not in os.environ:
        yield World(device=here)
        return
    backend, bound = ("nccl", here) if here.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=bound)
    yield World(dist.get_rank(), dist.get_world_size(), here)
    # Only after success: after an error this would wait for ranks that may never come. The process ends, and torchrun,
    # which sees that, ends the others.
    dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on every rank; the values themselves where there is one process."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether this is how a collective ends when another rank is gone or does not come in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class FirstRankError(RuntimeError):
    """What the first rank did for all has failed. The message is that of its error."""


def on_first_rank(action: Callable[[], object]) -> None:
    """Runs `action` on the first rank while the others wait; where it fails, all fail, the others with FirstRankError.

    It must use no collective.
    """
    if not dist.is_initialized():
        action()
        return
    failure = None
    if dist.get_rank() == 0:
        try:
            action()
        except BaseException as error:
            failure = error
    told = [None if failure is None else str(failure) or type(failure).__name__]
    dist.broadcast_object_list(told, 0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise FirstRankError(told[0])


def spread_buffers(model: torch.nn.Module) -> None:
    """Gives every rank the first one's buffers, which are those that a checkpoint has."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
