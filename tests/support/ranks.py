"""Runs a function, or the training program, on several gloo ranks, each a process."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def server():
    """What ranks are forked from: a process that imports once, and shares nothing with the tests' own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rigfuse.train.main", "support.toy_experiment"])
    return context


def run_ranks(function, size: int, *arguments) -> None:
    """`function(world, *arguments)` on every rank; an error on one of them is raised here."""
    server()
    given = (size, free_port(), function, arguments)
    torch.multiprocessing.start_processes(_rank, given, nprocs=size, start_method="forkserver")


def _rank(rank, size, port, function, arguments):
    from rigfuse.train.distributed import world

    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    torch.set_num_threads(1)
    with world(timeout=60, device="cpu") as here:
        function(here, *arguments)


def train_toy_on_ranks(size: int, logs: Path, *arguments: str) -> list[tuple[int, str]]:
    """`train/main.py` with the toy on ranks that nobody watches over: exit status (−9 = killed) and output of each.

    A rank that is still there after a minute counts as hanging, and raises.
    """
    context = server()
    logs.mkdir()
    files, port = [logs / f"rank-{rank}.txt" for rank in range(size)], free_port()
    ranks = [context.Process(target=_train_toy, args=(n, size, port, file, arguments)) for n, file in enumerate(files)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    hanging = [rank for rank in ranks if rank.exitcode is None]
    for rank in hanging:
        rank.kill()
    output = [file.read_text() for file in files]
    assert not hanging, f"{len(hanging)} ranks did not end: {output}"
    return [(rank.exitcode, text) for rank, text in zip(ranks, output)]


def _train_toy(rank, size, port, file, arguments):
    from rigfuse.train import main as program
    from support.toy_experiment import toy

    with open(file, "w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    program.experiment = lambda name: toy()
    program.main(list(arguments))
