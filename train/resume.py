"""Going on from a checkpoint with settings that may have changed: what can be applied is, the rest is refused by name.

Everything that a run computes with is built from the present settings; a checkpoint adds weights, the optimiser's
moments, the scale of float16 and the place. So whatever changed applies, but for what the checkpoint's own contents
depend on: the seed (the order of the data), the shapes of the weights, which parameters train, and the size of the
data set in the middle of an epoch.
"""

from dataclasses import asdict
from pathlib import Path

from . import checkpoint
from .average import WeightAverage
from .checkpoint import CheckpointError
from .config import ScheduleConfig, diff, to_dict
from .optim import load_moments, moments
from .order import EpochBatches
from .progress import Progress


def state_of(trainer) -> dict:
    """What a checkpoint of this moment holds. `model` is what is evaluated: with `run.ema` the averages."""
    weights, average = trainer.model.state_dict(), None
    if trainer.average is not None:
        weights, learning = trainer.average.split(weights)
        average = dict(weights=learning, updates=trainer.average.updates)
    return dict(
        model=weights,
        average=average,
        optimizer=moments(trainer.model, trainer.optimizer),
        scaler=trainer.scaler.state_dict(),
        counters=asdict(trainer.progress),
        data=dict(items=trainer.batches.length, per_step=trainer.batches.per_step),
        config=to_dict(trainer.experiment),
    )


def warmup_samples(schedule: ScheduleConfig, batches: EpochBatches) -> int:
    """How many samples the warm-up lasts."""
    samples = schedule.warmup_steps * batches.per_step
    return min(samples, round(schedule.warmup_epochs * batches.length)) if schedule.warmup_epochs else samples


def take_over(trainer, path: str | Path) -> list[str]:
    """Gives a trainer, as built from the present settings, a checkpoint's state; returns what to tell about it.

    Raises:
        CheckpointError: it cannot be loaded, or a setting changed that cannot change here.
    """
    state = checkpoint.load(path)
    changed = diff(state["config"], to_dict(trainer.experiment))
    try:
        progress = Progress(**state["counters"])
        average, optimizer, scaler, data = (state[name] for name in ("average", "optimizer", "scaler", "data"))
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be resumed, another version wrote it ({error})") from None
    lines = _adapt(trainer, path, progress, data, changed)
    try:
        checkpoint.load_weights(trainer.model, state["model"], path)
        load_moments(trainer.model, trainer.optimizer, optimizer, trainer.freezing.names)
    except (CheckpointError, ValueError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else f"{path} cannot be resumed: {error}"
        since = [f"changed: {line}" for line in changed if line.startswith(("model.", "optim.freeze", "optim.mult"))]
        raise CheckpointError("; ".join([reason, *since[:5]])) from None
    lines += _take_average(trainer, average)
    if scaler and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(scaler)
    trainer.progress = progress
    where = progress.describe(trainer.batches, trainer.run.epochs)
    return [
        f"resumed from {path} at step {progress.step}: {where}",
        *(f"  changed: {line}" for line in changed),
        *lines,
    ]


def _adapt(trainer, path, progress, data, changed) -> list[str]:
    """Translates the place into what it means now, or refuses."""
    experiment, batches, epochs, lines = trainer.experiment, trainer.batches, trainer.run.epochs, []
    settings = {line.split(":")[0]: line for line in changed}
    if "run.seed" in settings:
        raise CheckpointError(f"{path} cannot be resumed in another order of the data; changed: {settings['run.seed']}")
    if progress.epoch >= epochs:
        needs = f"run.epochs is {epochs}, needs at least {progress.epoch + 1}"
        raise CheckpointError(f"{path} is in epoch {progress.epoch}, counted from 0; {needs}")
    items, per_step = data["items"], data["per_step"]
    ended = items - progress.samples < per_step
    if not ended and progress.samples and items != batches.length:
        place = f"{progress.samples} samples into an epoch of {items}"
        raise CheckpointError(f"{path} is {place}, the training set now has {batches.length}; resume at an epoch's end")
    if ended and (items, per_step) != (batches.length, batches.per_step):
        progress.samples = batches.length  # none of it is left, however the steps are cut
    if per_step != batches.per_step:
        lines.append(f"a step has {batches.per_step} samples over all ranks, it had {per_step}")
    if settings.keys() & {"schedule.warmup_steps", "schedule.warmup_epochs"}:
        progress.warmup_samples = warmup_samples(experiment.schedule, batches)
    if settings.keys() & {"metric", "metric_mode"}:
        progress.best = progress.best_step = None
        lines.append(f"the best checkpoint is looked for anew: {experiment.metric}, {experiment.metric_mode}")
    return lines


def _take_average(trainer, saved) -> list[str]:
    """The model holds the averages of a run that had them; it goes on from the weights behind these."""
    if saved is None:
        return []
    model, weights = trainer.model, saved["weights"]
    averages = {name: value.clone() for name, value in model.state_dict().items() if name in weights}
    model.load_state_dict(weights, strict=False)
    if not trainer.run.ema:
        return ["run.ema is off: training goes on from the weights, without their average"]
    trainer.average = WeightAverage(model, trainer.run.ema)
    trainer.average.load(averages, saved["updates"])
    return []
