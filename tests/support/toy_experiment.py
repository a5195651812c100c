"""An experiment that trains in milliseconds and fails where it is told to. As a script: what torchrun starts."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from rigfuse.train.config import Experiment, apply_options
from rigfuse.train.distributed import sum_over_ranks


@dataclass
class ToyModel:
    width: int = 8
    dropout: float = 0.1
    norm: bool = False  # a batch norm before everything
    fault: str = ""  # "kind@rank:step": nan, raise, sigkill, sigterm, sigterm-parent, sigterm-group


@dataclass
class ToyData:
    items: int = 24
    bad: tuple[int, ...] = ()  # items that name a broken file
    huge: tuple[int, ...] = ()  # items with values whose variance is infinite, though the normalised ones are not


@dataclass
class ToyExperiment(Experiment):
    model: ToyModel = field(default_factory=ToyModel)
    data: ToyData = field(default_factory=ToyData)
    metric: str = "error"
    metric_is_nan: bool = False

    def build_model(self):
        return ToyNetwork(self.model)

    def build_data(self):
        return ToyItems(self.data, self.run.seed), ToyItems(ToyData(items=5), self.run.seed + 1)

    def collate(self, items):
        x, y, bad_files = zip(*items)
        return ToyBatch(torch.stack(x), torch.stack(y), [name for names in bad_files for name in names])

    def evaluate(self, model, loader):
        sums = torch.zeros(2)
        for batch in loader:
            sums += torch.tensor([(model.predict(batch) - batch.y).square().sum().item(), len(batch.y)])
        total, count = sum_over_ranks(sums).tolist()
        return dict(error=float("nan") if self.metric_is_nan else total / count, count=count)

    def figure_names(self):
        return ("error", "count")


@dataclass
class ToyBatch:
    x: torch.Tensor
    y: torch.Tensor
    bad_files: list[str]

    def to(self, device):
        return self


@dataclass
class Output:
    losses: dict[str, torch.Tensor]


class ToyItems(torch.utils.data.Dataset):
    def __init__(self, data, seed):
        self.data, self.seed = data, seed

    def __len__(self):
        return self.data.items

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch * 1009 + index)
        x = torch.randn(4, generator=generator)
        y = x.sum(0, keepdim=True)
        x[2] = 3e38 if index in self.data.huge else x[2]
        return x, y, [f"image-{index}.jpg"] if index in self.data.bad else []


class ToyNetwork(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.norm = nn.BatchNorm1d(4) if settings.norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(4, settings.width), nn.Dropout(settings.dropout), nn.GELU())
        self.head = nn.Linear(settings.width, 1)
        self.extra = nn.Linear(settings.width, 1)  # used by about half of the steps only
        kind, _, place = settings.fault.partition("@")
        rank, _, step = place.partition(":")
        self._fault = (kind, int(rank or 0), int(step or 0))
        self._calls = 0
        self.seeds = []  # that the random state of each call began with

    def predict(self, batch):
        return self.head(self.body(self.norm(batch.x)))

    def forward(self, batch):
        self.seeds.append(torch.initial_seed())
        hidden = self.body(self.norm(batch.x))
        main = (self.head(hidden) - batch.y).square().mean()
        losses = dict(main=main * self._faulty())
        if batch.x[0, 0] > 0:
            losses["extra"] = self.extra(hidden).abs().mean()
        self._calls += 1
        return Output(losses)

    def _faulty(self):
        """NaN, or an error, or a signal, from the step on that the fault names, on its rank."""
        kind, rank, step = self._fault
        if not kind or int(os.environ.get("RANK", 0)) != rank or self._calls < step:
            return 1.0
        if kind == "raise":
            raise RuntimeError("the toy broke on purpose")
        if kind == "nan":
            return float("nan")
        if self._calls == step:
            _terminate(kind)
        return 1.0


def _terminate(kind):
    """SIGKILL to this process; SIGTERM to it, to torchrun above it, or from outside to it and its loaders' workers."""
    if kind == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "sigterm-group":
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        subprocess.run(["kill", *map(str, processes)], check=True)
    else:
        os.kill(os.getpid() if kind == "sigterm" else os.getppid(), signal.SIGTERM)


def toy(*options: str) -> ToyExperiment:
    """The toy with `a.b=c` settings."""
    experiment = ToyExperiment(name="toy", losses=dict(main=1.0, extra=0.1))
    experiment.optim.lr, experiment.schedule.warmup_steps = 0.02, 3
    experiment.loader.batch_size, experiment.loader.workers = 2, 0
    experiment.run.epochs, experiment.run.log_steps, experiment.run.tensorboard = 2, 1, False
    return apply_options(experiment, options)


def train_on_ranks(world, folder):
    """What test_distributed looks at: a run, the same resumed, one that one rank began, one with a NaN on one rank,
    one with an infinite statistic on one rank; and what `maps_on_ranks` does, which needs two ranks too."""
    from rigfuse.train.trainer import Trainer
    from support import maps_on_ranks

    def fit(name, *options, resume=None):
        trainer = Trainer(toy("model.dropout=0", *options), folder / name, world, resume=resume)
        trainer.fit()
        torch.save(trainer.state_dict() | dict(seeds=trainer.model.seeds), folder / f"{name}-{world.rank}.pt")

    def step(name, number):
        return folder / name / "checkpoints" / f"step-{number:08d}.pt"

    fit("whole", "losses.extra=0", "run.checkpoint_steps=1", "run.keep=50")
    fit("resumed", "losses.extra=0", resume=step("whole", 5))
    fit("from-one", "losses.extra=0", resume=step("single", 4))
    fit("dropout", "model.dropout=0.5", "run.checkpoint_steps=1", "run.keep=50", "run.ema=0.9")
    fit("dropout-resumed", "model.dropout=0.5", "run.ema=0.9", resume=step("dropout", 7))
    fit("nan", "model.fault=nan@1:9", "run.accumulate=2", "model.norm=true")
    fit("thaw", "optim.freeze_until={'head': 4}", "model.norm=true")
    fit("huge", f"data.huge={HUGE}", "model.norm=true", "run.epochs=1")
    _the_first_rank_acts(world, folder / "first")
    evaluate_on_rank(world, folder)
    maps_on_ranks.train_on_ranks(world, folder / "maps")


HUGE = 22  # with the toy's seed, this item is on rank 1 in the first epoch


def _the_first_rank_acts(world, folder):
    """What test_distributed knows of `on_first_rank` and of a save that takes its time, from the other rank."""
    from rigfuse.train import checkpoint
    from rigfuse.train.distributed import FirstRankError, on_first_rank
    from rigfuse.train.trainer import Trainer

    def slowly():
        time.sleep(0.7)
        folder.mkdir()
        (folder / "acted").touch()

    def fail():
        raise OSError("the disk is full")

    on_first_rank(slowly)
    seen = dict(acted=(folder / "acted").exists())
    try:
        on_first_rank(fail)
    except (OSError, FirstRankError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    save = checkpoint.save
    checkpoint.save = lambda *arguments: (time.sleep(0.7), save(*arguments))
    Trainer(toy(), folder, world)._save()
    seen["saved"] = (folder / "checkpoints" / "last.pt").exists()
    (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))


def evaluate_on_rank(world, folder):
    """The figures of a real experiment with its first weights."""
    from rigfuse.train.systems import experiment
    from rigfuse.train.trainer import Trainer

    options = ("data.scenes=1,1", "data.image_size=32,64", "loader.batch_size=3", "model.vae.enable=false")
    options += ("evaluate_without=CAM_FRONT,CAM_BACK",)
    figures = Trainer(apply_options(experiment("completion_v2_tiny"), options), folder, world).evaluate()
    (folder / f"figures-{world.size}-{world.rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    from rigfuse.train.distributed import world
    from rigfuse.train.trainer import Trainer

    with world(timeout=60, device="cpu") as here:
        Trainer(toy(*sys.argv[2:]), sys.argv[1], here).fit()
