"""Loaders of an experiment's data, and what happens to a batch between them and the network."""

import os
import signal
import threading
from itertools import islice

import torch
from torch.utils.data import DataLoader

from .config import Experiment
from .distributed import World
from .order import EpochBatches


class TrainingError(RuntimeError):
    """Training cannot go on. The message says why."""


def build_loaders(experiment: Experiment, world: World) -> tuple[EpochBatches, DataLoader, DataLoader]:
    """(order of the training set, its loader, the loader of this rank's share of the validation set)."""
    settings, run = experiment.loader, experiment.run
    training, validation = experiment.build_data()
    batches = EpochBatches(len(training), settings.batch_size, run.accumulate, world, run.seed)
    share = [(0, index) for index in _share(validation, world)]
    options = dict(collate_fn=experiment.collate, num_workers=settings.workers)
    options |= dict(pin_memory=world.device.type == "cuda")
    options |= dict(generator=torch.Generator())  # or a loader would take a number from the step's random state
    if settings.workers:
        options |= dict(worker_init_fn=_outlive_sigterm)
    validation = DataLoader(validation, sampler=share, batch_size=settings.batch_size, **options)
    return batches, DataLoader(training, batch_sampler=batches, **options), validation


def _share(validation, world: World):
    """The items that this rank evaluates: every so many, unless the data set has a say, as where it is streamed."""
    if hasattr(validation, "share"):
        return validation.share(world.rank, world.size)
    return range(world.rank, len(validation), world.size)


class BadFiles:
    """Files that batches name as missing or broken: each is told once, and too many are an error."""

    def __init__(self, limit: int, rank: int):
        self.limit, self.rank, self._names = limit, rank, {}

    def __len__(self) -> int:
        return len(self._names)

    def count(self, batch) -> None:
        for name in getattr(batch, "bad_files", ()):
            if name not in self._names:
                self._names[name] = None
                print(f"rank {self.rank}: skipped {name}", flush=True)
        if len(self._names) > self.limit:
            names, limit = ", ".join(islice(self._names, 3)), self.limit
            raise TrainingError(f"more than {limit} files are missing or broken (loader.max_bad_files): {names}, …")


class OnDevice:
    """A loader's batches, checked for bad files and moved to the device; `tell(done, of)` hears of each."""

    def __init__(self, loader: DataLoader, device: torch.device, bad_files: BadFiles, tell=None):
        self._loader, self._device, self._bad_files, self._tell = loader, device, bad_files, tell

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self):
        for place, batch in enumerate(self._loader):
            self._bad_files.count(batch)
            if self._tell is not None:
                self._tell(place, len(self))
            yield batch.to(self._device)


def _outlive_sigterm(worker: int) -> None:
    """A loader's worker goes on when everybody is told to stop, as torchrun does; the trainer saves, then ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
