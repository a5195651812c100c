"""Training: the loop, and what makes it safe to stop, resume and repeat.

Nothing random is carried from step to step: the order of the data follows from (seed, epoch), an item from
(seed, epoch, index), and every step seeds torch's generators from (seed, rank, step). So a checkpoint needs weights,
the optimiser's moments, scaler and the place in the run, and a resumed run is bit for bit the one that was not
interrupted. The place is counted in samples (`progress`), so it keeps its meaning when the shape of a step changes
(`resume`).
"""

import json
import math
import signal
import time
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..kernels.runtime.nvtx import annotate
from . import checkpoint
from .average import WeightAverage
from .buffers import Buffers
from .config import Experiment, check, dumps
from .distributed import World, on_first_rank, spread_buffers, sum_over_ranks
from .files import write_whole
from .loading import BadFiles, OnDevice, TrainingError, build_loaders
from .log import Meter, RunLog, as_time, machine, peak_memory, reset_peak_memory
from .optim import FreezeSchedule, Schedule, build_optimizer, learning_rate, set_training
from .order import seed_step
from .progress import Progress
from .resume import state_of, take_over, warmup_samples

__all__ = ["Trainer", "TrainingError"]


class Trainer:
    """Trains an experiment.

    Args:
        experiment: settings and task.
        folder: of the run: config.json, log.jsonl, TensorBoard's events, checkpoints/, and result.json at the end.
        world: this process among the ranks.
        resume: a checkpoint to continue from.
        profile: start and stop CUDA's profiler round `run.profile_steps`.
        weights: a checkpoint of another run to begin with, see `checkpoint.take_weights`; nothing when resuming.

    Raises:
        ValueError: settings out of range, or that do not fit the model or the data.
        checkpoint.CheckpointError: `resume` cannot be used.
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
        check(experiment)
        experiment.folder = Path(folder)
        self.experiment, self.run, self.world, self.profile = experiment, experiment.run, world, profile
        self.folder, self.progress, self.average = Path(folder), Progress(), None
        self.bad_files = BadFiles(experiment.loader.max_bad_files, world.rank)
        self._stop, self._saved_step, self._branched_at, self._figures = False, -1, None, {}
        self.log = RunLog(None, 0)
        torch.manual_seed(self.run.seed)
        torch.use_deterministic_algorithms(self.run.deterministic)
        torch.backends.cudnn.benchmark = not self.run.deterministic
        self.batches, self.training, self.validation = build_loaders(experiment, world)
        self.model = experiment.build_model().to(world.device)
        self.begun = [] if weights is None or resume else [checkpoint.take_weights(self.model, weights)]
        self.optimizer = build_optimizer(self.model, experiment.optim, self.batches.per_step)
        self.freezing = FreezeSchedule(self.model, experiment.optim.freeze_until)
        self.schedule = Schedule(self.optimizer, experiment.schedule)
        self.amp = getattr(torch, self.run.amp)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.progress.warmup_samples = warmup_samples(experiment.schedule, self.batches)
        if resume is not None:
            self._resume(Path(resume))
        self.total = self.progress.total_steps(self.batches, self.run.epochs)
        self._set_rates()
        self.freezing.apply(self.progress.step)
        self._prepare_network()

    def fit(self) -> dict[str, float]:
        """Trains to the end and returns the last evaluation's figures. SystemExit(143) after a SIGTERM, once saved;
        TrainingError where the experiment does not approve of the network."""
        progress, figures, began = self.progress, {}, time.monotonic()
        self.experiment.approve(self.model)
        reset_peak_memory(self.world.device)
        if self.run.ema and self.average is None:
            self.average = WeightAverage(self.model, self.run.ema)
        on_first_rank(self._open)
        try:
            with self._saving_on_sigterm():
                while progress.epoch < self.run.epochs:
                    self._train_epoch()
                    self._save()
                    figures = self._evaluate()
                    progress.epoch, progress.samples = progress.epoch + 1, 0
            on_first_rank(lambda: self._finish(figures, time.monotonic() - began))
        finally:
            self.log.close()
        return figures

    def evaluate(self) -> dict[str, float]:
        """The experiment's figures for the weights as they are, or their average, over all ranks."""
        self.model.eval()
        spread_buffers(self.model)
        seed_step(self.run.seed, self.world.rank, 0)
        batches = OnDevice(self.validation, self.world.device, self.bad_files, self.log.evaluating)
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with averaged, torch.no_grad(), self._autocast(), annotate("evaluate"):
            return self.experiment.evaluate(self.model, batches)

    # ---- one epoch, one step

    def _train_epoch(self):
        set_training(self.model)
        self.buffers = Buffers(self.model)
        self.batches.epoch, self.batches.start = self.progress.epoch, self.progress.samples
        if len(self.batches):
            loader = OnDevice(self.training, self.world.device, self.bad_files)
            with closing(iter(loader)) as batches:  # ends its workers at once
                self._train_on(batches)

    def _train_on(self, batches):
        """What is left of the epoch."""
        progress, run = self.progress, self.run
        meter = Meter(list(self.experiment.losses), self.world.device)
        for _ in range(self.batches.steps_left):
            self._profiler()
            self._thaw()
            seed_step(run.seed, self.world.rank, progress.step)
            losses, norm, applied, stop = self._step(batches)
            self._count(applied)
            self.log.advance(progress.step)
            meter.add(losses)
            if progress.step % run.log_steps == 0 or progress.step == self.total:
                self._record(*meter.read(), norm)
            self._check_skipped(applied)
            if stop:
                self._save()
                self.log.say(f"stopped by SIGTERM at step {progress.step}; --resume auto continues")
                raise SystemExit(128 + signal.SIGTERM)
            if run.checkpoint_steps and progress.step % run.checkpoint_steps == 0:
                self._save()

    def _thaw(self):
        """Lets parameters train whose step has come."""
        thawed = self.freezing.apply(self.progress.step)
        if thawed:
            self._prepare_network()
            set_training(self.model)
            self.buffers = Buffers(self.model)
            self.log.say(f"step {self.progress.step}: {len(thawed)} parameters train from here on: {thawed[0]}, …")

    def _prepare_network(self):
        """What trains, and the network that reduces its gradients."""
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ValueError("optim.freeze_until freezes every parameter, nothing is left to train")
        self.network = None  # gives back what an earlier one has hooked to the parameters
        self.network = DistributedDataParallel(self.model) if self.world.size > 1 else self.model

    def _step(self, batches) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool, bool]:
        """One update from `accumulate` batches: mean losses, gradient norm, whether it was applied, whether to stop."""
        sums, finite = {}, torch.ones((), dtype=torch.bool, device=self.world.device)
        self.buffers.remember()
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
        if self.world.is_main:
            self.experiment.watch(self.model, batch, output, self.progress.step, self.folder)
        losses, self._figures = output.losses, getattr(output, "figures", {})
        weights = self.experiment.losses
        for name in losses:
            if name not in weights:
                raise TrainingError(
                    f"the loss {name!r} has no weight; the experiment's losses are {', '.join(weights)}"
                )
        total = sum(weights[name] * loss for name, loss in losses.items())
        # Every parameter takes part in every step, so that all ranks reduce the same gradients whatever stages ran.
        return losses, total + sum(parameter.sum() * 0 for parameter in self.trained)

    def _update(self, finite):
        """Applies the step unless a loss, a gradient or a buffer of any rank is not finite; all ranks decide the same.

        A step that is not applied leaves nothing behind.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.experiment.optim.clip or math.inf)
        finite = finite & norm.isfinite() & self.buffers.sound()
        broken, stop = self._agreed(not bool(finite), self._stop)
        if broken:
            self.buffers.restore()
        else:
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update()
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm, not broken, stop

    def _count(self, applied):
        progress, samples = self.progress, self.batches.per_step
        progress.step += 1
        progress.samples += samples
        if not applied:
            progress.skipped += 1
            progress.skipped_samples += samples
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        self._set_rates()

    def _set_rates(self):
        self.schedule.set(*self.progress.place(self.batches, self.run.epochs))

    def _check_skipped(self, applied):
        progress = self.progress
        if not applied:
            what = "a loss, gradient or buffer is not finite"
            self.log.say(f"step {progress.step}: {what}; skipped ({progress.skipped} so far)")
        if progress.skipped_in_a_row > self.run.max_skipped:
            skipped = f"{progress.skipped_in_a_row} steps in a row had a loss, gradient or buffer that is not finite"
            raise TrainingError(f"{skipped} (run.max_skipped is {self.run.max_skipped}); the weights are those before")

    # ---- checkpoints, evaluation, log

    def state_dict(self) -> dict:
        return state_of(self)

    def _resume(self, path):
        self.begun, progress = take_over(self, path), self.progress
        if path.resolve().parent == self._checkpoints.resolve():
            self._saved_step = self._branched_at = progress.step
        if progress.best_step is not None and not self._checkpoint(progress.best_step).exists():
            progress.best = progress.best_step = None
            self.begun.append("the best checkpoint of then is not here; the best from here on is kept")

    def _open(self):
        """Takes the folder over, on the first rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.json", dumps(self.experiment) + "\n")
        (self.folder / "result.json").unlink(missing_ok=True)
        self.log = RunLog(self.folder, self.total, self.progress.step, self.run.tensorboard)
        for line in (*self.begun, *self.experiment.remarks(self.model), *self._rates_in_words()):
            self.log.say(line)
        if self._branched_at is not None:
            checkpoint.go_back(self._checkpoints, self._branched_at, self.progress.best_step)

    def _rates_in_words(self):
        optim = self.experiment.optim
        if optim.base_batch:
            samples = self.batches.per_step
            rate = f"{learning_rate(optim, samples):g} for the {samples} of this run"
            yield f"optim.lr {optim.lr:g} is for {optim.base_batch} samples a step, {rate}"

    def _save(self):
        """One checkpoint of this step, written by the first rank while the others wait."""

        def write():
            checkpoint.save(self._checkpoints, step, self.state_dict(), self.run.keep, self._branched_at)

        step = self.progress.step
        if self._saved_step != step:
            on_first_rank(write)
            self._saved_step, self._branched_at = step, None

    def _evaluate(self):
        """Evaluates where it is due and lets best.pt point to the checkpoint if it is the best. NaN never is."""
        progress, experiment = self.progress, self.experiment
        if (progress.epoch + 1) % self.run.evaluate_epochs and progress.epoch + 1 < self.run.epochs:
            return {}
        figures = self.evaluate()
        if experiment.metric not in figures:
            raise TrainingError(f"metric is {experiment.metric!r}, the evaluation gives {', '.join(figures)}")
        value, sign = figures[experiment.metric], 1 if experiment.metric_mode == "min" else -1
        if not math.isnan(value) and (progress.best is None or sign * value < sign * progress.best):
            progress.best, progress.best_step = value, progress.step
        on_first_rank(self._link_best)
        self.log.record(progress.step, progress.epoch, {f"val/{name}": value for name, value in figures.items()})
        return figures

    def _link_best(self):
        if self.progress.best_step == self.progress.step:
            checkpoint.link(self._checkpoint(self.progress.step), "best")

    def _record(self, losses, rate, norm):
        """Each loss on its own, the learning rate of each group, and what the model shows of its last batch."""
        figures = {"loss": sum(self.experiment.losses[name] * value for name, value in losses.items())}
        figures |= {f"losses/{name}": value for name, value in losses.items()}
        figures |= {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        figures |= {name: value.item() for name, value in self._figures.items()}
        figures |= {"grad_norm": norm.item(), "skipped": self.progress.skipped, "speed/it_per_s": rate}
        figures |= {"memory/peak_mib": peak_memory(self.world.device), "bad_files": len(self.bad_files)}
        self.log.record(self.progress.step, self.progress.epoch, figures)
        for line in self.experiment.lines(figures):
            self.log.say(line)

    def _finish(self, figures, seconds):
        """The result, for a person and for a program."""
        progress, metric = self.progress, self.experiment.metric
        counts = dict(steps=progress.step, epochs=progress.epoch, skipped=progress.skipped)
        best = dict(metric=metric, value=progress.best, step=progress.best_step)
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        result = dict(name=self.experiment.name, **counts, bad_files=len(self.bad_files), best=best, figures=finite)
        result |= dict(machine=machine(self.world.device) | dict(ranks=self.world.size))
        write_whole(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        self.log.say(f"finished after {progress.step} steps, {progress.skipped} of them skipped; {as_time(seconds)}")
        for name, value in figures.items():
            self.log.say(f"  {name:<32} {value:.5g}")
        if progress.best_step is not None:
            where = f"at step {progress.best_step}: {self._checkpoints / 'best.pt'}"
            self.log.say(f"best {metric} {progress.best:.5g} {where}")

    # ---- small parts

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _checkpoint(self, step) -> Path:
        return checkpoint.path_of(self._checkpoints, step)

    def _autocast(self):
        return torch.autocast(self.world.device.type, self.amp, enabled=self.amp != torch.float32)

    def _agreed(self, *here: bool) -> list[bool]:
        """For each question, whether it is so on any rank."""
        return [count > 0 for count in sum_over_ranks(torch.tensor(here, device=self.world.device).float()).tolist()]

    def _profiler(self):
        if self.profile and self.world.device.type == "cuda":
            start, stop = self.run.profile_steps
            if self.progress.step == start:
                torch.cuda.profiler.start()
            if self.progress.step == stop:
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
