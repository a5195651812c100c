"""What a subject of the benchmark is: one file in `subjects/` with its option, cases, workloads, claims and listing."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..train.command_line import TextTable, UsageError, choose
from ..train.data import Drive
from . import report
from .claims import Judged
from .floors import measure_machine
from .measure import Effort
from .results import Outcome, Skipped
from .runner import Runner, Settings
from .workload import MODE_NAMES, STEP, Unavailable, Workload


@dataclass(frozen=True)
class Place:
    """One case in one scope."""

    scope: str
    case: str


@dataclass(frozen=True)
class Plan:
    """What a command line asks a subject for. `name`: of the results. `providers`: those timed, the baseline first."""

    name: str
    places: tuple[Place, ...]
    providers: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        return self.providers[0]

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(place.case for place in self.places))

    @property
    def scopes(self) -> list[str]:
        return list(dict.fromkeys(place.scope for place in self.places))


@dataclass(frozen=True)
class Request:
    """A checked command line. `earlier`: the rows and facts of `--against`."""

    subject: "Subject"
    plan: Plan
    arguments: argparse.Namespace
    modes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    drives: list[Drive]
    out: Path
    earlier: tuple[list, dict] | None


Advance = Callable[[float, float, str], None]  # done and total in any unit, and what is done now


class Subject:
    """Something to measure by workloads: results first, then time and memory.

    A subject of another kind overrides `measure` and `tables`.

    option: of the command line, without dashes. about: one line for --help and --list.
    takes: the options besides its own that mean something to it. any_rig: whether it takes any rig, or nuScenes' alone.
    how_to_read: what explains its report.
    """

    option: str
    about: str
    settings: dict = dict(action="store_true")  # of the option
    takes: frozenset[str] = frozenset({"case", "quick", "mode", "device", "dtype", "data", "profile"})
    any_rig: bool = False
    how_to_read: str = report.HOW_TO_READ

    def default_dtype(self, device: torch.device) -> str:
        return "bfloat16" if device.type == "cuda" else "float32"

    def add_options(self, add: Callable) -> None:
        """Adds the options that mean something with this subject alone; `add` is argparse's add_argument."""

    def plan(self, arguments: argparse.Namespace, device: torch.device) -> Plan:
        """What the command line asks for; raises UsageError."""
        raise NotImplementedError

    def make_workload(self, place: Place, request: Request) -> Workload:
        """The workload of a place; raises Unavailable."""
        raise NotImplementedError

    def work(self, place: Place) -> float:
        """How long a place takes beside others, about; for the time left."""
        return 1.0

    def measure(self, request: Request, outcome: Outcome, advance: Advance) -> None:
        """Measures everything into `outcome`."""
        weights = [self.work(place) for place in request.plan.places]
        advance(0, sum(weights), "this machine's bandwidth and rate")
        machine = measure_machine(request.device, request.dtype)
        settings = Settings(request.device, request.dtype, request.modes, request.effort)
        done = 0.0
        for place, weight in zip(request.plan.places, weights):

            def show(what, share, done=done, weight=weight):
                advance(done + share * weight, sum(weights), what)

            try:
                Runner(settings, machine, outcome, show).run(self.make_workload(place, request))
            except Unavailable as reason:
                outcome.skip(Skipped(place.scope, place.case, "all", str(reason)))
            done += weight

    def workloads(self, request: Request) -> Iterable[Workload]:
        """Those that can be made here, one after another, so that one at a time is in memory."""
        for place in request.plan.places:
            try:
                yield self.make_workload(place, request)
            except Unavailable:
                continue

    def judge(self, request: Request, outcome: Outcome) -> list[Judged]:
        """The documents' claims about this subject."""
        return []

    def tables(self, request: Request, outcome: Outcome) -> list[TextTable]:
        """What was measured, for the terminal and for report.md."""
        return report.measurement_tables(outcome, request.plan.baseline)

    def pictures(self, request: Request, folder: Path) -> list[str]:
        """Draws what only this subject has into the folder; returns the files' names."""
        return []

    def listing(self) -> list[TextTable]:
        """What can be chosen, for --list and for the README."""
        return []


def chosen(kind: str, names: list[str] | None, choices: Iterable[str]) -> list[str]:
    """The names, each once, if all of them are among the choices, of which no names take all."""
    choices = list(choices)
    return [choose(kind, name, choices) for name in dict.fromkeys(names or choices)]


def modes_of(mode: str | None) -> tuple[str, ...]:
    return tuple(MODE_NAMES) if mode is None else (choose("mode", mode, MODE_NAMES),)


def with_mode(plan: Plan, mode: str | None) -> Plan:
    """The plan without the places where the mode asked for does not exist."""
    if mode is None:
        return plan
    places = tuple(place for place in plan.places if (place.scope == STEP) == (mode == STEP))
    if not places:
        raise UsageError(f"--mode {mode}: the scope step has the mode step and no other; nothing else has it")
    return Plan(plan.name, places, plan.providers)
