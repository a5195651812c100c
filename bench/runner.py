"""Takes a workload through its stations: correctness, time, memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import correctness, measure
from .floors import Machine
from .memory import peak_bytes
from .results import Difference, Outcome, Row, Skipped
from .workload import STEP, Call, Unavailable, Workload

_CHECKING = 0.4  # the share of a workload's time, about; half of it is timing, the rest memory


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    modes: tuple[str, ...]
    effort: measure.Effort  # for each case and mode, shared by all providers

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Runner:
    """Runs workloads one after another and gathers the `outcome`."""

    def __init__(self, settings: Settings, machine: Machine, outcome: Outcome, advance: Callable[[str, float], None]):
        """advance: called with what comes next and the share of the workload that is done."""
        self.settings, self.machine, self.outcome, self._advance = settings, machine, outcome, advance

    def run(self, workload: Workload) -> None:
        modes = [mode for mode in self.settings.modes if mode in workload.modes]
        self.outcome.sizes[workload.scope, workload.case] = dict(workload.sizes)
        self.outcome.keys.update({(workload.case, name): count for name, count in workload.keys.items()})
        calls = self._check(workload, tuple(modes))
        if workload.floor is not None:
            for provider in calls:
                floor = workload.floor(provider, self.settings.dtype)
                for mode in modes:
                    key = (workload.scope, workload.case, provider, mode)
                    self.outcome.floors[key] = self.machine.floor_ms(floor, mode)
        timed = {}
        for number, mode in enumerate(modes):
            self._tell(workload, f"time, {mode}", _CHECKING + 0.5 * number / len(modes))
            timed[mode] = self._time(workload, calls, mode)
        for number, mode in enumerate(modes):
            self._tell(workload, f"memory, {mode}", _CHECKING + 0.5 + 0.1 * number / len(modes))
            for provider, call in calls.items():
                warm_up = provider not in timed[mode]
                self._attempt(workload, provider, lambda: self._memory(workload, provider, call, mode, warm_up))

    def _tell(self, workload, what, share):
        self._advance(f"{workload.scope} · {workload.case} · {what}", share)

    def _attempt(self, workload: Workload, provider: str, action):
        """The action's result; None, and a line in the report, where this provider cannot do it here."""
        try:
            return action()
        except Unavailable as reason:
            self._skip(workload, provider, str(reason))
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory, a size that a peer refuses, …
            self._skip(workload, provider, (str(error).strip() or type(error).__name__).splitlines()[0][:200])

    def _skip(self, workload, provider, reason, wrong=False):
        self.outcome.skip(Skipped(workload.scope, workload.case, provider, reason, wrong))

    def _row(self, workload: Workload, provider: str, mode: str, metric: str, samples: list[float], value=None):
        value = measure.summarise(samples).median if value is None else value
        place = (workload.subject, workload.scope, workload.case, provider)
        dtype, device = self.settings.dtype_name, self.settings.device.type
        self.outcome.add(Row(*place, device, dtype, mode, metric, value, samples))

    def _check(self, workload: Workload, modes: tuple[str, ...]) -> dict[str, Call]:
        """The calls to be timed: those whose outputs and gradients are right, in the order of `timed`."""
        calls, checked = {}, 0
        for group, plain in workload.plain.items():
            members = [name for name in workload.timed if workload.groups[name] == group]
            if not members:
                continue
            self._tell(workload, f"reference of {group}", _CHECKING * checked / len(workload.timed))
            reference = correctness.compute(workload.build_reference(group), modes)
            plain_result = plain_error = None
            for provider in dict.fromkeys([plain, *members]):
                self._tell(workload, f"results of {provider}", _CHECKING * checked / len(workload.timed))
                checked += provider in workload.timed
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

    def _time(self, workload: Workload, calls: dict[str, Call], mode: str) -> set[str]:
        """Times the calls; returns the providers that ran."""
        settings, ran = self.settings, set()
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
                effort = replace(settings.effort, seconds=settings.effort.seconds / len(metrics))
                samples = measure.interleave(samplers, effort)
                for provider, values in samples.items():
                    self._row(workload, provider, mode, metric, values)
                ran |= set(samples)
        return ran

    def _memory(self, workload, provider, call, mode, warm_up):
        self._row(workload, provider, mode, "peak_bytes", [peak_bytes(call, mode, self.settings.device, warm_up)])
