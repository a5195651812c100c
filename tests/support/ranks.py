"""Runs a function on several gloo ranks, each a process."""

import os
import socket

import torch
import torch.multiprocessing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function, size: int, *arguments) -> None:
    """`function(world, *arguments)` on every rank; an error on one of them is raised here."""
    torch.multiprocessing.spawn(_rank, (size, free_port(), function, arguments), nprocs=size)


def _rank(rank, size, port, function, arguments):
    from rigfuse.train.distributed import world

    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    torch.set_num_threads(1)
    with world(timeout=60, device="cpu") as here:
        function(here, *arguments)
