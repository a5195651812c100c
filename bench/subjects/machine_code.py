"""What the operations' kernels are compiled to, for GPUs that need not be there: anyone can count it.

The launches are those of an operation at the benchmark's sizes, forward and backward. Counted are registers, bytes that
spill, shared memory, programs, and the instructions of each loop; and, where the work of a kernel depends on the
values, the share of it that these inputs cause.
"""

import torch

from ...kernels.runtime.backends import interpreting, triton_installed
from ...train.command_line import TextTable, UsageError, choose
from ..operation import make_call, make_inputs
from ..operations import OPERATIONS
from ..results import Row, Skipped
from ..subject import Place, Plan, Subject, chosen

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # those of `compilation.TARGETS`, which needs triton
_COLUMNS = dict(
    programs="programs",
    registers="registers",
    spilled_bytes="spilled bytes",
    shared_bytes="shared bytes",
    instructions="instructions",
)


def plan_of(name: str, operations: list[str], arguments) -> Plan:
    """Each operation at the cases that matter, or those named."""
    if interpreting() or not triton_installed():
        raise UsageError(f"--{name} needs triton's compiler: install triton, unset TRITON_INTERPRET")
    operations = chosen("operation", operations, OPERATIONS)
    places = []
    for operation in operations:
        cases = arguments.case or OPERATIONS[operation].that_matter
        places += [Place(operation, choose("case", case, OPERATIONS[operation].cases)) for case in cases]
    return Plan(name, tuple(places), ("rigfuse",))


class MachineCode(Subject):
    option = "machine-code"
    about = "count what the kernels are compiled to; needs no GPU"
    settings = dict(nargs="*", metavar="OPERATION")
    takes = frozenset({"case", "dtype"})
    how_to_read = __doc__

    def default_dtype(self, device):
        return "bfloat16"  # as on a GPU, whatever is here

    def add_options(self, add):
        add("--architecture", nargs="+", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)} (default: sm_90)")

    def plan(self, arguments, device):
        chosen("architecture", arguments.architecture, ARCHITECTURES)
        return plan_of(self.option, arguments.machine_code, arguments)

    def measure(self, request, outcome, advance):
        architectures = request.arguments.architecture or ["sm_90"]
        pairs = [(place, architecture) for place in request.plan.places for architecture in architectures]
        for done, (place, architecture) in enumerate(pairs):
            advance(done, len(pairs), f"{place.scope} · {place.case} · {architecture}")
            try:
                for row in count(place, architecture, request.dtype):
                    outcome.add(row)
            except (RuntimeError, ValueError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                outcome.skip(Skipped(place.scope, place.case, architecture, reason))

    def tables(self, request, outcome):
        return [*_kernels(outcome.rows), *_shares(outcome.rows)]

    def listing(self):
        rows = [[operation.name, ", ".join(operation.that_matter)] for operation in OPERATIONS.values()]
        title = "--machine-code, --overhead [OPERATION …]"
        return [TextTable(title, ["operation", "cases where none is named"], 2, rows)]


SUBJECT = MachineCode()


def count(place: Place, architecture: str, dtype: torch.dtype) -> list[Row]:
    """The rows of every kernel that the operation `place.scope` starts at a case."""
    from ..compilation import compile_launches

    operation = OPERATIONS[place.scope]
    made = make_inputs(operation, place.case, dtype, torch.device("cpu"))
    call = make_call(made, operation.function)
    outputs = []
    launches = {"fwd": lambda: outputs.extend(call.forward())}
    if made.leaves:
        leaves = list(call.leaves.values())
        launches["bwd"] = lambda: torch.autograd.grad(outputs[0], leaves, call.grad, allow_unused=True)
    rows, seen = [], {}

    def add(kernel, mode, metric, value, samples=None):
        name = str(dtype).removeprefix("torch.")
        key = (SUBJECT.option, place.scope, place.case, kernel, architecture, name, mode, metric)
        rows.append(Row(*key, float(value), [float(sample) for sample in samples or [value]]))

    for mode, launch in launches.items():
        for kernel in compile_launches(architecture, launch):
            seen[kernel.name] = seen.get(kernel.name, 0) + 1
            name = kernel.name if seen[kernel.name] == 1 else f"{kernel.name} #{seen[kernel.name]}"
            numbers = (kernel.programs, kernel.registers, kernel.spilled, kernel.shared, len(kernel.instructions))
            counted = 5 if kernel.instructions else 4  # AMD's are not
            for metric, value in list(zip(_COLUMNS, numbers))[:counted]:
                add(name, mode, metric, value)
            if kernel.loops:
                add(name, mode, "loop_instructions", max(kernel.loops), kernel.loops)
    for what, share in (operation.shares(made, architecture) if operation.shares else {}).items():
        add(what, "fwd", "share", share)
    return rows


def _kernels(rows):
    """A table for each operation, case and architecture, a row for each kernel."""
    columns = ["kernel", "of", *_COLUMNS.values(), "instructions of each loop"]
    tables = {}
    for row in (row for row in rows if row.metric != "share"):
        kernels = tables.setdefault((row.scope, row.case, row.device), {})
        kernels.setdefault((row.provider, row.mode), {})[row.metric] = row
    for place, kernels in tables.items():
        text = TextTable(", ".join(place), columns, left=2)
        for kernel, found in kernels.items():
            loops = found.get("loop_instructions")
            cells = [f"{found[metric].value:,.0f}" if metric in found else "—" for metric in _COLUMNS]
            text.rows.append([*kernel, *cells, " · ".join(f"{n:.0f}" for n in loops.samples) if loops else "—"])
        yield text


def _shares(rows):
    shares = [row for row in rows if row.metric == "share"]
    if shares:
        cells = [[row.scope, row.case, row.device, row.provider, f"{row.value:.1%}"] for row in shares]
        yield TextTable("What these inputs cause", ["operation", "case", "architecture", "share of", "is"], 4, cells)
