"""Runs of the toy: trained, read back, compared."""

import json

import torch

from rigfuse.train import checkpoint
from rigfuse.train.distributed import World
from rigfuse.train.trainer import Trainer
from support.toy_experiment import toy


def train(folder, *options, resume=None):
    trainer = Trainer(toy(*options), folder, World(), resume=resume)
    trainer.fit()
    return trainer


def last(folder):
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def figures(folder, after):
    """What was computed in later steps, without times."""
    names = ("loss", "val", "lr", "grad")
    later = [line for line in lines(folder) if line["step"] > after]
    return [{name: value for name, value in line.items() if name.startswith(names)} for line in later]


def assert_same(a, b, where=""):
    """Bit for bit, however deep."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
