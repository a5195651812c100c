"""Training: the loop, and what makes it safe to stop, resume and repeat.

Nothing random is carried from step to step: the order of the data follows from (seed, epoch), an item from
(seed, epoch, index), and every step seeds torch's generators from (seed, rank, step). So a checkpoint needs weights,
optimiser, schedule, scaler and three counters, and a resumed run is bit for bit the one that was not interrupted.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..kernels.runtime.nvtx import annotate
from . import checkpoint
from .config import Experiment, diff, to_dict
from .distributed import World, sum_over_ranks, wait_for_all
from .log import Meter, RunLog, peak_memory
from .optim import build_optimizer, build_schedule, set_training


class TrainingError(RuntimeError):
    """Training cannot go on. The message says why."""


@dataclass
class Counters:
    epoch: int = 0
    batch: int = 0  # of the epoch: where training continues
    step: int = 0  # of the run, those skipped included
    skipped: int = 0  # steps
    skipped_in_a_row: int = 0
    best: float | None = None  # value of the metric


class EpochBatches:
    """Batch sampler: this rank's batches of one epoch, as lists of (epoch, index).

    Every epoch is a permutation drawn from (seed, epoch); what does not fill a step on all ranks is left out.
    """

    def __init__(self, length: int, batch_size: int, accumulate: int, world: World, seed: int):
        self.length, self.batch_size, self.world, self.seed = length, batch_size, world, seed
        self.steps = length // (batch_size * accumulate * world.size)
        if self.steps == 0:
            needed = f"{batch_size} (batch) × {accumulate} (accumulate) × {world.size} (ranks)"
            raise ValueError(f"the training set has {length} items, one step needs {needed}")
        self.batches = self.steps * accumulate
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.start, self.batches):
            first = (batch * self.world.size + self.world.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


class Trainer:
    """Trains an experiment.

    Args:
        experiment: settings and task.
        folder: of the run: config.json, log.jsonl, TensorBoard's events, checkpoints/.
        world: this process among the ranks.
        resume: a checkpoint to continue from.
        profile: start and stop CUDA's profiler round `run.profile_steps`.
        weights: a checkpoint of another run to begin with, see `checkpoint.take_weights`; nothing when resuming.

    Raises:
        ValueError: settings that do not fit the model or the data. checkpoint.CheckpointError: `resume` cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: str | Path,
        world: World,
        resume: str | Path | None = None,
        profile: bool = False,
        weights: str | Path | None = None,
    ):
        self.experiment, self.run, self.world, self.profile = experiment, experiment.run, world, profile
        self.folder, self.counters = Path(folder), Counters()
        self._stop, self._bad_files, self._saved_step, self._figures = False, {}, -1, {}
        torch.manual_seed(self.run.seed)
        torch.use_deterministic_algorithms(self.run.deterministic)
        torch.backends.cudnn.benchmark = not self.run.deterministic
        self._build_loaders()
        self.model = experiment.build_model().to(world.device)
        self.begun = [] if weights is None or resume else [checkpoint.take_weights(self.model, weights)]
        self.optimizer = build_optimizer(self.model, experiment.optim)
        self.total = self.batches.steps * self.run.epochs
        self.schedule = build_schedule(self.optimizer, experiment.schedule, self.total)
        self.amp = getattr(torch, self.run.amp)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.begun += self._load(resume) if resume is not None else []
        self.network = DistributedDataParallel(self.model) if world.size > 1 else self.model

    def fit(self) -> dict[str, float]:
        """Trains to the end and returns the last evaluation's figures. SystemExit(143) after a SIGTERM, once saved."""
        main = self.world.is_main
        self.log = RunLog(self.folder if main else None, self.total, self.counters.step, self.run.tensorboard)
        for line in self.begun:
            self.log.say(line)
        figures = {}
        try:
            with self._saving_on_sigterm():
                while self.counters.epoch < self.run.epochs:
                    self._train_epoch()
                    self._save()
                    figures = self._evaluate()
                    self.counters.epoch += 1
                    self.counters.batch = 0
        finally:
            self.log.close()
        return figures

    def evaluate(self) -> dict[str, float]:
        """The experiment's figures for the weights as they are, over all ranks."""
        self.model.eval()
        seed_step(self.run.seed, self.world.rank, 0)
        with torch.no_grad(), self._autocast(), annotate("evaluate"):
            return self.experiment.evaluate(self.model, _OnDevice(self.validation, self))

    # ---- one epoch, one step

    def _train_epoch(self):
        set_training(self.model)
        self.batches.epoch, self.batches.start = self.counters.epoch, self.counters.batch
        if len(self.batches):
            with closing(iter(_OnDevice(self.training, self))) as batches:  # ends its workers at once
                self._train_on(batches)

    def _train_on(self, batches):
        """What is left of the epoch."""
        counters, run = self.counters, self.run
        meter = Meter(list(self.experiment.losses), self.world.device)
        while counters.batch < self.batches.batches:
            self._profiler()
            seed_step(run.seed, self.world.rank, counters.step)
            losses, norm, applied, stop = self._step(batches)
            counters.step += 1
            counters.batch += run.accumulate
            self.log.advance(counters.step)
            meter.add(losses)
            if counters.step % run.log_steps == 0 or counters.step == self.total:
                self._record(*meter.read(), norm)
            self._check_skipped(applied)
            if stop:
                self._save()
                self.log.say(f"stopped by SIGTERM at step {counters.step}; --resume auto continues")
                raise SystemExit(128 + signal.SIGTERM)
            if run.checkpoint_steps and counters.step % run.checkpoint_steps == 0:
                self._save()

    def _step(self, batches) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool, bool]:
        """One update from `accumulate` batches: mean losses, gradient norm, whether it was applied, whether to stop."""
        sums, finite = {}, torch.ones((), dtype=torch.bool, device=self.world.device)
        for place in range(self.run.accumulate):
            with annotate("data"):
                batch = next(batches)
            last = place == self.run.accumulate - 1
            with nullcontext() if last or self.world.size == 1 else self.network.no_sync():
                with annotate("forward"):
                    losses, total = self._forward(batch)
                with annotate("backward"):
                    self.scaler.scale(total / self.run.accumulate).backward()
            finite &= total.detach().isfinite()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach().float() / self.run.accumulate
        with annotate("optimiser"):
            norm, applied, stop = self._update(finite)
        return sums, norm, applied, stop

    def _forward(self, batch):
        with self._autocast():
            output = self.network(batch)
        losses, self._figures = output.losses, getattr(output, "figures", {})
        weights = self.experiment.losses
        for name in losses:
            if name not in weights:
                raise ValueError(f"the loss {name!r} has no weight; set losses.{name}, there are {', '.join(weights)}")
        total = sum(weights[name] * loss for name, loss in losses.items())
        # Every parameter takes part in every step, so that all ranks reduce the same gradients whatever stages ran.
        return losses, total + sum(parameter.sum() * 0 for parameter in self.trained)

    def _update(self, finite):
        """Applies the gradients unless a loss or a gradient of any rank is not finite; all ranks decide the same."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.experiment.optim.clip or math.inf)
        broken, stop = self._agreed(not bool(finite & norm.isfinite()), self._stop)
        if not broken:
            self.scaler.step(self.optimizer)
            self.schedule.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm, not broken, stop

    def _check_skipped(self, applied):
        counters = self.counters
        counters.skipped += not applied
        counters.skipped_in_a_row = 0 if applied else counters.skipped_in_a_row + 1
        if not applied:
            self.log.say(f"step {counters.step}: a loss or gradient is not finite; skipped ({counters.skipped} so far)")
        if counters.skipped_in_a_row > self.run.max_skipped:
            skipped = f"{counters.skipped_in_a_row} steps in a row had a loss or gradient that is not finite"
            raise TrainingError(f"{skipped} (run.max_skipped is {self.run.max_skipped}); the weights are those before")

    # ---- checkpoints, evaluation, log

    def _save(self):
        """One checkpoint of this step, written by the first rank while the others wait."""
        if self._saved_step != self.counters.step:
            if self.world.is_main:
                checkpoint.save(self._checkpoints, self.counters.step, self.state_dict(), self.run.keep)
            self._saved_step = self.counters.step
        wait_for_all()

    def _evaluate(self):
        """Evaluates where it is due and lets best.pt point to the checkpoint if it is the best. NaN never is."""
        counters, experiment = self.counters, self.experiment
        if (counters.epoch + 1) % self.run.evaluate_epochs and counters.epoch + 1 < self.run.epochs:
            return {}
        figures = self.evaluate()
        if experiment.metric not in figures:
            raise ValueError(f"metric is {experiment.metric!r}, the evaluation gives {', '.join(figures)}")
        value, sign = figures[experiment.metric], 1 if experiment.metric_mode == "min" else -1
        if not math.isnan(value) and (counters.best is None or sign * value < sign * counters.best):
            counters.best = value
            if self.world.is_main:
                checkpoint.link(self._checkpoints / f"step-{counters.step:08d}.pt", "best")
        self.log.record(counters.step, counters.epoch, {f"val/{name}": value for name, value in figures.items()})
        return figures

    def _record(self, losses, rate, norm):
        """Each loss on its own, the learning rate of each group, and what the model shows of its last batch."""
        figures = {"loss": sum(self.experiment.losses[name] * value for name, value in losses.items())}
        figures |= {f"losses/{name}": value for name, value in losses.items()}
        figures |= {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        figures |= {name: value.item() for name, value in self._figures.items()}
        figures |= {"grad_norm": norm.item(), "skipped": self.counters.skipped, "speed/it_per_s": rate}
        figures |= {"memory/peak_mib": peak_memory(self.world.device), "bad_files": len(self._bad_files)}
        self.log.record(self.counters.step, self.counters.epoch, figures)

    def state_dict(self) -> dict:
        return dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
            counters=asdict(self.counters),
            epoch=self._epoch_shape,
            config=to_dict(self.experiment),
        )

    def _load(self, path) -> list[str]:
        """Takes over a checkpoint; returns what to tell about it."""
        state = checkpoint.load(path)
        counters, here, there = Counters(**state["counters"]), self._epoch_shape, state["epoch"]
        if counters.batch == there["batches"]:
            counters.batch = here["batches"]  # between epochs their shape may change
        elif counters.batch and here != there:
            was, now = (f"{shape['batches']} batches of {shape['items']} items" for shape in (there, here))
            raise checkpoint.CheckpointError(f"{path} is from the middle of an epoch of {was}, this run has {now}")
        checkpoint.load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty unless it was float16
            self.scaler.load_state_dict(state["scaler"])
        self.counters = counters
        if Path(path).resolve().parent == self._checkpoints.resolve():
            self._saved_step = counters.step
        changed = diff(state["config"], to_dict(self.experiment))
        return [f"resumed from {path} at step {counters.step}", *(f"  changed: {line}" for line in changed)]

    # ---- small parts

    @property
    def _epoch_shape(self) -> dict[str, int]:
        """Over all ranks; what the place in an epoch means."""
        return dict(batches=self.batches.batches, items=self.experiment.loader.batch_size * self.world.size)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _build_loaders(self):
        experiment, settings, world = self.experiment, self.experiment.loader, self.world
        training, validation = experiment.build_data()
        self.batches = EpochBatches(len(training), settings.batch_size, self.run.accumulate, world, self.run.seed)
        share = [(0, index) for index in range(world.rank, len(validation), world.size)]
        options = dict(collate_fn=experiment.collate, num_workers=settings.workers)
        options |= dict(pin_memory=world.device.type == "cuda")
        options |= dict(generator=torch.Generator())  # or a loader would take a number from the step's random state
        if settings.workers:
            options |= dict(worker_init_fn=_outlive_sigterm)
        self.training = DataLoader(training, batch_sampler=self.batches, **options)
        self.validation = DataLoader(validation, sampler=share, batch_size=settings.batch_size, **options)

    def _autocast(self):
        return torch.autocast(self.world.device.type, self.amp, enabled=self.amp != torch.float32)

    def _agreed(self, *here: bool) -> list[bool]:
        """For each question, whether it is so on any rank."""
        return [count > 0 for count in sum_over_ranks(torch.tensor(here, device=self.world.device).float()).tolist()]

    def count_bad_files(self, batch) -> None:
        for name in getattr(batch, "bad_files", ()):
            if name not in self._bad_files:
                self._bad_files[name] = None
                print(f"rank {self.world.rank}: skipped {name}", flush=True)
        limit = self.experiment.loader.max_bad_files
        if len(self._bad_files) > limit:
            names = ", ".join(islice(self._bad_files, 3))
            raise TrainingError(f"more than {limit} files are missing or broken (loader.max_bad_files): {names}, …")

    def _profiler(self):
        if self.profile and self.world.device.type == "cuda":
            start, stop = self.run.profile_steps
            if self.counters.step == start:
                torch.cuda.profiler.start()
            if self.counters.step == stop:
                torch.cuda.profiler.stop()

    @contextmanager
    def _saving_on_sigterm(self):
        def note(number, frame):
            self._stop = True

        previous = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


class _OnDevice:
    """A loader's batches, checked for bad files and moved to the device."""

    def __init__(self, loader: DataLoader, trainer: Trainer):
        self._loader, self._trainer = loader, trainer

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self):
        for batch in self._loader:
            self._trainer.count_bad_files(batch)
            yield batch.to(self._trainer.world.device)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Every step begins with the random state that belongs to it, on the CPU and on the GPU."""
    torch.manual_seed(hash_seed(seed, rank, step))


def hash_seed(*numbers: int) -> int:
    """A seed for each tuple of numbers; neighbours share nothing (splitmix64's mixing, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _outlive_sigterm(worker: int) -> None:
    """A loader's worker goes on when everybody is told to stop, as torchrun does; the trainer saves, then ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
