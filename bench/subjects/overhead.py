"""What one call of an operation costs the CPU, whatever the kernels take: checks, registration, the launch's plan and
triton's own work. Only the launch itself is left out, so no GPU is needed."""

import time

import torch

from ...train.command_line import TextTable
from ..operation import make_call, make_inputs
from ..operations import OPERATIONS
from ..results import Row
from ..subject import Subject
from ..workload import MODE_NAMES
from .machine_code import plan_of

ARCHITECTURE = "sm_90"
_WARM_UP, _BATCHES, _CALLS = 20, 30, 10


class Overhead(Subject):
    option = "overhead"
    about = "µs of CPU that a call costs, launches left out; needs no GPU"
    settings = dict(nargs="*", metavar="OPERATION")
    takes = frozenset({"case", "dtype"})
    how_to_read = __doc__

    def default_dtype(self, device):
        return "bfloat16"

    def plan(self, arguments, device):
        arguments.case = arguments.case or ["tiny"]  # small results: memory is had otherwise on a GPU
        return plan_of(self.option, arguments.overhead, arguments)

    def measure(self, request, outcome, advance):
        for done, place in enumerate(request.plan.places):
            advance(done, len(request.plan.places), f"{place.scope} · {place.case}")
            for mode, samples in microseconds(place, request.dtype).items():
                name = str(request.dtype).removeprefix("torch.")
                key = (self.option, place.scope, place.case, "rigfuse", "cpu", name, mode, "call_us")
                outcome.add(Row(*key, sorted(samples)[len(samples) // 2], samples))

    def tables(self, request, outcome):
        text = TextTable("One call, launches left out", ["operation", "case", "mode", "µs (20–80 %)"], left=3)
        for row in outcome.rows:
            spread = row.summary
            cells = [row.scope, row.case, MODE_NAMES[row.mode]]
            text.rows.append([*cells, f"{spread.median:.0f} ({spread.p20:.0f}–{spread.p80:.0f})"])
        return [text]


SUBJECT = Overhead()


def microseconds(place, dtype: torch.dtype) -> dict[str, list[float]]:
    """Of a call in each mode, as means over a few calls in a row."""
    from ..compilation import launches_that_start_nothing

    operation = OPERATIONS[place.scope]
    made = make_inputs(operation, place.case, dtype, torch.device("cpu"))
    call = make_call(made, operation.function)
    found = {}
    with launches_that_start_nothing(ARCHITECTURE):
        for mode in ("fwd", "fwd-bwd") if made.leaves else ("fwd",):
            for _ in range(_WARM_UP):
                call.step(mode)
            found[mode] = []
            for _ in range(_BATCHES):
                start = time.thread_time_ns()  # what other processes take does not count
                for _ in range(_CALLS):
                    call.step(mode)
                found[mode].append((time.thread_time_ns() - start) / _CALLS / 1e3)
    return found
