"""What a run tells: a progress bar, JSON lines, TensorBoard."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .distributed import sum_over_ranks


class RunLog:
    """Writes one run's figures, under the same names in every run, so that two of them open side by side.

    `log.jsonl` holds one line for each record; TensorBoard's events go to the same folder, so that
    `tensorboard --logdir work_dirs` shows runs by folder. Each record is a printed line too; a terminal shows a
    progress bar below them.

    Args:
        folder: of the run; None = say and write nothing (ranks other than the first).
        total: steps of the whole run.
        step: where the run begins; records of later steps, from before a resume, are dropped.
        tensorboard: write its events too.
    """

    def __init__(self, folder: Path | None, total: int, step: int = 0, tensorboard: bool = True):
        self.active, self._total, self._writer = folder is not None, total, None
        if not self.active:
            return
        self._console = Console()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _open_lines(folder / "log.jsonl", step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=step, note="")
        self._bar.start()
        self._started = (time.monotonic(), step)

    def advance(self, step: int) -> None:
        if self.active:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        """Figures by name; a "/" in a name groups them. Values may be NaN."""
        if not self.active:
            return
        line = dict(step=step, epoch=epoch, time=round(time.time(), 3), **figures)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)
        shown = " · ".join(f"{name.removeprefix('losses/')} {value:.4g}" for name, value in figures.items())
        self.say(f"step {step}/{self._total} · epoch {epoch} · left {self._left(step)} · {shown}")
        if "loss" in figures:
            note = f"{figures['speed/it_per_s']:.2f} it/s · {figures['memory/peak_mib']:.0f} MiB"
            self._bar.update(self._task, description=f"epoch {epoch}", note=note)

    def say(self, text: str) -> None:
        if self.active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if not self.active:
            return
        self._bar.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _left(self, step):
        began, first = self._started
        if step <= first:
            return "?"
        seconds = int((time.monotonic() - began) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Meter:
    """Means of the losses, and the speed, since it was last read. Does not wait for the device until it is."""

    def __init__(self, names: list[str], device: torch.device):
        self.names = names
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)  # values, counts
        self._steps, self._since = 0, time.monotonic()

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """A step's losses; one that is not there, or not finite, does not count."""
        self._steps += 1
        for name, loss in losses.items():
            place, counts = self.names.index(name), loss.isfinite()
            self._sums[:, place] += torch.stack([loss.double().nan_to_num() * counts, counts.double()])

    def read(self) -> tuple[dict[str, float], float]:
        """Means over all steps and ranks of each loss that occurred, and steps per second. Called on all ranks."""
        sums, counts = sum_over_ranks(self._sums).tolist()
        rate = self._steps / max(time.monotonic() - self._since, 1e-9)
        self._sums, self._steps, self._since = torch.zeros_like(self._sums), 0, time.monotonic()
        return {name: value / n for name, value, n in zip(self.names, sums, counts) if n}, rate


def peak_memory(device: torch.device) -> float:
    """MiB: the allocator's peak on a GPU, the process's peak elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024


def _open_lines(path, step):
    """The file to append to, without the lines of steps after `step`: they will be written again."""
    kept = []
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))
    return open(path, "a")
