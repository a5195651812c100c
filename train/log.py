"""What a run tells: a progress bar, JSON lines, TensorBoard."""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..kernels.runtime.extras import require
from .command_line import EVERY
from .distributed import sum_over_ranks
from .files import write_whole

_DAMAGED = "log.jsonl.damaged"


class RunLog:
    """Writes one run's figures, under the same names in every run, so that two of them open side by side.

    `log.jsonl` holds one line for each record; TensorBoard's events go to the same folder, so that
    `tensorboard --logdir work_dirs` shows runs by folder. Each record is a printed line too; a terminal shows a
    progress bar below them, anything else gets a line where half a minute would pass without one.

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
        self._said = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._file, damaged = _open_lines(folder / "log.jsonl", step)
        if damaged:
            self.say(f"{damaged} lines of {folder / 'log.jsonl'} cannot be read; the file as it was is {_DAMAGED}")
        if tensorboard:
            require("train", "tensorboard")
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
        """After every step."""
        if self.active:
            self._bar.update(self._task, completed=step)
            self._sign_of_life(f"step {step}/{self._total} · left {self._left(step)}")

    def evaluating(self, done: int, batches: int) -> None:
        """Before every batch of an evaluation."""
        if self.active:
            self._bar.update(self._task, description="evaluate", note=f"{done}/{batches} batches")
            self._sign_of_life(f"evaluating: {done}/{batches} batches")

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
            self._said = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if not self.active:
            return
        self._bar.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _sign_of_life(self, text):
        if not self._console.is_terminal and time.monotonic() - self._said >= EVERY:
            self.say(text)

    def _left(self, step):
        began, first = self._started
        if step <= first:
            return "?"
        return as_time((time.monotonic() - began) / (step - first) * (self._total - step))


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


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures of this process depend on: processor, threads, GPU where that is the device, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = dict(cpu=names[0] if names else platform.machine(), threads=torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= dict(gpu=properties.name, gpu_mib=properties.total_memory // 2**20)
    return facts | dict(torch=torch.__version__, python=platform.python_version())


def peak_memory(device: torch.device) -> float:
    """MiB: the allocator's peak on a GPU, the process's peak elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak: what this process held before does not count. Does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now


def as_time(seconds: float) -> str:
    """Hours:minutes:seconds."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _open_lines(path, step):
    """The file to append to, and how many lines could not be read.

    Lines of steps after `step`, and its evaluation, go: they will be written again. So does a last line that a killed
    run left half.
    """
    damaged, kept = 0, []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for place, line in enumerate(lines):
        try:
            record = json.loads(line)
            later = record["step"] > step or (record["step"] == step and any(n.startswith("val/") for n in record))
        except (ValueError, TypeError, KeyError):
            damaged += place + 1 < len(lines)
            continue
        if not later:
            kept.append(line.decode())
    if damaged:
        os.replace(path, path.with_name(_DAMAGED))
    if lines:  # the last of those kept may lack its line break
        write_whole(path, "".join(f"{line}\n" for line in kept))
    return open(path, "a"), damaged
