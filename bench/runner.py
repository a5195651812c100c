"""Takes a workload through its stations: correctness, time, memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import correctness, measure
from .floors import Machine
from .memory import peak_bytes
from .results import Row
from .workload import STEP, Call, Unavailable, Workload


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    modes: tuple[str, ...]
    seconds: float  # of timing, for each case and mode, shared by all providers
    least_rounds: int
    most_rounds: int = 100

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why. `wrong`: because the result was."""

    scope: str
    case: str
    provider: str
    reason: str
    wrong: bool = False


@dataclass(frozen=True)
class Difference:
    """How far a provider is from the plain one of its group, in the dtype of the run."""

    scope: str
    case: str
    provider: str
    worst: float


@dataclass
class Outcome:
    """Everything a run found out. `floors` in ms by (scope, case, provider, mode), `keys` by (case, provider)."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    floors: dict[tuple[str, str, str, str], float] = field(default_factory=dict)
    keys: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    @property
    def wrong(self) -> list[Skipped]:
        return [skipped for skipped in self.skipped if skipped.wrong]


class Runner:
    """Runs workloads one after another and gathers the `outcome`."""

    def __init__(self, settings: Settings, machine: Machine, advance: Callable[[str, int], None]):
        """advance: called with what comes next and how many of `steps` are done."""
        self.settings, self.machine, self.advance = settings, machine, advance
        self.outcome = Outcome()
        self._done = 0

    def steps(self, workloads: int) -> int:
        return workloads * (1 + 2 * len(self.settings.modes))

    def run(self, workload: Workload) -> None:
        modes = [mode for mode in self.settings.modes if mode in workload.modes]
        self.outcome.sizes[workload.scope, workload.case] = dict(workload.sizes)
        self.outcome.keys.update({(workload.case, name): count for name, count in workload.keys.items()})
        self._advance(workload, "results")
        calls = self._check(workload, tuple(modes))
        for mode in modes:
            self._advance(workload, f"time, {mode}")
            self._time(workload, calls, mode)
        for mode in modes:
            self._advance(workload, f"memory, {mode}")
            for provider, call in calls.items():
                self._attempt(workload, provider, lambda: self._memory(workload, provider, call, mode))
        self._done += 2 * (len(self.settings.modes) - len(modes))
        if workload.floor is not None:
            for provider in calls:
                floor = workload.floor(provider, self.settings.dtype)
                for mode in modes:
                    key = (workload.scope, workload.case, provider, mode)
                    self.outcome.floors[key] = self.machine.floor_ms(floor, mode)

    def _advance(self, workload, what):
        self.advance(f"{workload.scope} · {workload.case} · {what}", self._done)
        self._done += 1

    def _attempt(self, workload: Workload, provider: str, action):
        """The action's result; None, and a line in the report, where this provider cannot do it here."""
        try:
            return action()
        except Unavailable as reason:
            self._skip(workload, provider, str(reason))
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory, a size that a peer refuses, …
            self._skip(workload, provider, (str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _skip(self, workload, provider, reason, wrong=False):
        skipped = Skipped(workload.scope, workload.case, provider, reason, wrong)
        if skipped not in self.outcome.skipped:
            self.outcome.skipped.append(skipped)

    def _row(self, workload: Workload, provider: str, mode: str, metric: str, samples: list[float], value=None):
        value = measure.summarise(samples).median if value is None else value
        place = (workload.subject, workload.scope, workload.case, provider)
        dtype, device = self.settings.dtype_name, self.settings.device.type
        self.outcome.rows.append(Row(*place, device, dtype, mode, metric, value, samples))

    def _check(self, workload: Workload, modes: tuple[str, ...]) -> dict[str, Call]:
        """The calls to be timed: those whose outputs and gradients are right, in the order of `timed`."""
        calls = {}
        for group, plain in workload.plain.items():
            members = [name for name, its_group in workload.groups.items() if its_group == group]
            if not set(members) & set(workload.timed):
                continue
            reference = correctness.compute(workload.build_reference(group), modes)
            plain_result = plain_error = None
            for provider in sorted(members, key=lambda name: name != plain):
                computed = self._attempt(workload, provider, lambda: self._compute(workload, provider, modes))
                if computed is None:
                    continue
                call, result, again = computed
                for mode in modes:
                    self._row(workload, provider, mode, "repeats", [float(correctness.repeats(result, again, mode))])
                error = correctness.errors(result, reference)
                if plain_result is not None:
                    worst = correctness.errors(result, plain_result).worst
                    self.outcome.differences.append(Difference(workload.scope, workload.case, provider, worst))
                if self._judge(workload, provider, error, plain_error) and provider in workload.timed:
                    calls[provider] = call
                if provider == plain:
                    plain_result, plain_error = result, error
        return {provider: calls[provider] for provider in workload.timed if provider in calls}

    def _compute(self, workload, provider, modes):
        call = workload.build(provider, self.settings.dtype)
        return call, correctness.compute(call, modes), correctness.compute(call, modes)

    def _judge(self, workload, provider, error: correctness.Errors, plain: correctness.Errors | None) -> bool:
        of_modes = [("fwd", error.outputs), ("fwd-bwd", error.grads)]
        for mode, tensors in [(STEP, error.tensors)] if STEP in workload.modes else of_modes:
            if tensors:
                self._row(workload, provider, mode, "error", list(tensors.values()), max(tensors.values()))
        excess = error.excess(self.settings.dtype, plain)
        if excess:
            self._skip(workload, provider, f"wrong result: {excess}; no speed reported", wrong=True)
        return not excess

    def _time(self, workload: Workload, calls: dict[str, Call], mode: str) -> None:
        settings = self.settings
        metrics = measure.METRICS[settings.device.type]
        for metric in metrics:
            samplers = {}
            for provider, call in calls.items():
                sampler = self._attempt(
                    workload, provider, lambda: measure.sampler(metric, call, mode, settings.device)
                )
                if sampler is not None:
                    samplers[provider] = sampler
            if samplers:
                seconds = settings.seconds / len(metrics)
                samples = measure.interleave(samplers, seconds, settings.least_rounds, settings.most_rounds)
                for provider, values in samples.items():
                    self._row(workload, provider, mode, metric, values)

    def _memory(self, workload, provider, call, mode):
        self._row(workload, provider, mode, "peak_bytes", [peak_bytes(call, mode, self.settings.device)])
