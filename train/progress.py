"""Where a run is. It is counted in samples, so that other ranks, batches or accumulation go on at the same place."""

from dataclasses import dataclass

from .order import EpochBatches


@dataclass
class Progress:
    """What a checkpoint keeps of the run's place, and what has happened on the way."""

    epoch: int = 0
    samples: int = 0  # of the epoch, over all ranks: where training continues
    step: int = 0  # of the run, those skipped included
    skipped: int = 0  # steps
    skipped_in_a_row: int = 0
    skipped_samples: int = 0  # of the run; they moved nothing, so the schedule does not count them
    warmup_samples: int = 0  # how long the schedule's warm-up is
    best: float | None = None  # value of the metric
    best_step: int | None = None

    def place(self, batches: EpochBatches, epochs: int) -> tuple[float, float, float]:
        """(step, total, warm-up) for the schedule, in steps of the present shape; fractions after a change of it."""
        whole = batches.steps * batches.per_step
        done = self.epoch * whole + min(self.samples, whole) - self.skipped_samples
        return done / batches.per_step, batches.steps * epochs, self.warmup_samples / batches.per_step

    def total_steps(self, batches: EpochBatches, epochs: int) -> int:
        """Those done and those to come."""
        left_in_epoch = (batches.length - self.samples) // batches.per_step
        return self.step + left_in_epoch + batches.steps * (epochs - self.epoch - 1)

    def describe(self, batches: EpochBatches, epochs: int) -> str:
        """Of a run that is resumed."""
        step, total, _ = self.place(batches, epochs)
        at = f"epoch {self.epoch} of {epochs}, {self.samples} of {batches.length} samples"
        return f"{at}; the schedule is at {step / total:.1%} of the run"
