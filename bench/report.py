"""The tables, once for the terminal and for `report.md`."""

from collections.abc import Sequence

from ..train.claims import UNSURE
from ..train.command_line import TextTable
from .claims import Judged
from .measure import paired_ratios, summarise
from .results import CHECKS, TIMES, Outcome, Row, Skipped, Table
from .workload import MODE_NAMES

_HEADINGS = dict(time_ms="time ms (20–80 %)", wall_ms="wall ms", graph_ms="graph ms")


def measurement_tables(outcome: Outcome, baseline: str) -> list[TextTable]:
    """For each scope and mode: time, memory and error of each provider at each case, beside the baseline's."""
    table = Table(outcome.rows)
    places = dict.fromkeys((row.scope, row.mode) for row in outcome.rows if row.metric not in CHECKS)
    return [_measurements(table, outcome, baseline, scope, mode) for scope, mode in places]


def _measurements(table: Table, outcome: Outcome, baseline: str, scope: str, mode: str) -> TextTable:
    rows = [row for row in table.rows if (row.scope, row.mode) == (scope, mode)]
    times = [metric for metric in TIMES if any(row.metric == metric for row in rows)]
    floors = any(key[0] == scope for key in outcome.floors)
    columns = ["case", "provider", *(_HEADINGS[metric] for metric in times), f"speed ÷ {baseline} (20–80 %)"]
    columns += ["peak MB", f"memory ÷ {baseline}", "error", "repeats", *(["floor ms (reached)"] if floors else [])]
    text = TextTable(f"{scope_name(rows[0])}, {MODE_NAMES[mode]}", columns, left=2)
    for case, provider in dict.fromkeys((row.case, row.provider) for row in rows if row.metric not in CHECKS):
        metrics = (*times, "peak_bytes", *CHECKS)
        found = {metric: table.get(scope, case, provider, mode, metric) for metric in metrics}
        base = {metric: table.get(scope, case, baseline, mode, metric) for metric in ("time_ms", "peak_bytes")}
        cells = [case, provider, *(time(found[metric]) for metric in times)]
        cells += [speed(base["time_ms"], found.get("time_ms")), megabytes(found["peak_bytes"])]
        cells += [share(base["peak_bytes"], found["peak_bytes"]), _error(found["error"])]
        cells.append({None: "—", 1: "yes", 0: "no"}[found["repeats"] and found["repeats"].value])
        if floors:
            cells.append(_floor(outcome.floors.get((scope, case, provider, mode)), found.get("time_ms")))
        text.rows.append(cells)
    slow = [case for case in dict.fromkeys(row.case for row in rows) if table.disturbed(scope, case, mode, "time_ms")]
    if slow:
        text.note = f"The machine changed its speed meanwhile, so these ratios say little: {', '.join(slow)}."
    return text


def scope_name(row: Row) -> str:
    """What a person calls the scope; an operation has only one."""
    return row.subject if row.scope == "operation" else row.scope


def row_line(row: Row) -> str:
    """One measurement as it comes."""
    unit = dict(time_ms="ms", wall_ms="ms, wall", graph_ms="ms, graph", call_us="µs").get(row.metric, row.metric)
    value = f"{megabytes(row)} MB" if row.metric == "peak_bytes" else f"{time(row)} {unit}"
    return f"{scope_name(row)} · {row.case} · {MODE_NAMES.get(row.mode, row.mode)} · {row.provider}: {value}"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time(row: Row | None) -> str:
    if row is None:
        return "—"
    spread = row.summary
    return f"{number(spread.median)} ({number(spread.p20)}–{number(spread.p80)})"


def speed(base: Row | None, row: Row | None) -> str:
    if base is None or row is None:
        return "—"
    ratio = summarise(paired_ratios(base.samples, row.samples))
    return f"{number(ratio.median)}× ({number(ratio.p20)}–{number(ratio.p80)})"


def megabytes(row: Row | None) -> str:
    return "—" if row is None else number(row.value / 1e6)


def share(base: Row | None, row: Row | None) -> str:
    return "—" if base is None or row is None or base.value == 0 else f"{row.value / base.value:.0%}"


def _error(row: Row | None) -> str:
    return "—" if row is None else f"{row.value:.1e}"


def _floor(floor: float | None, row: Row | None) -> str:
    if floor is None or row is None:
        return "—"
    return f"{number(floor)} ({floor / row.value:.0%})"


def claims_table(claims: Sequence[Judged]) -> TextTable:
    rows = [[claim.text, claim.figure, claim.verdict] for claim in claims]
    return TextTable("The documents' claims", ["claim", "figure", "verdict"], 3, rows)


def skipped_table(skipped: Sequence[Skipped]) -> TextTable:
    rows = [[item.scope, item.case, item.provider, item.reason] for item in skipped]
    return TextTable("Not measured", ["scope", "case", "provider", "why"], 4, rows)


def against_table(now: Sequence[Row], then: Sequence[Row], name: str) -> TextTable:
    """This run beside an earlier one. A change counts where the ranges of 20th to 80th percentile are apart."""
    earlier = {row.key: row for row in then}
    tables = Table(then), Table(now)
    columns = ["scope", "case", "provider", "mode", "metric", "then", "now", "now ÷ then", "verdict"]
    table = TextTable(f"Against {name}", columns, left=5)
    for row in now:
        before = earlier.get(row.key)
        if row.metric in CHECKS or before is None:
            continue
        ratio = f"{row.value / before.value:.2f}" if before.value else "—"
        place = [row.scope, row.case, row.provider, row.mode, row.metric]
        where = (row.scope, row.case, row.mode, row.metric)
        unsure = row.metric in TIMES and any(rows.disturbed(*where) for rows in tables)
        verdict = UNSURE if unsure else _change(before, row)
        table.rows.append([*place, number(before.value), number(row.value), ratio, verdict])
    absent = sum(row.key not in earlier for row in now if row.metric not in CHECKS)
    table.note = f"{absent} measurements of this run are not in the earlier one." if absent else ""
    return table


def _change(before: Row, row: Row) -> str:
    then, now = before.summary, row.summary
    if now.p20 > then.p80:
        return "worse"
    return "better" if now.p80 < then.p20 else "same"


def against_warnings(facts: dict, then: dict) -> list[str]:
    """What makes the comparison unfair."""
    return [
        f"Against the earlier run {name} differ: {then.get(name)} then, {facts[name]} now"
        for name in ("hardware", "versions")
        if then.get(name) != facts[name]
    ]


HOW_TO_READ = """## How to read this

- Correctness came first: each provider's output and gradients were compared with the same mathematics in float64.
  `error` is the relative error in the 2-norm, of the worst tensor. A provider that errs on any tensor more than twice
  as much as plain PyTorch in the same dtype, rounding aside, has no speed here. `repeats` says whether a second
  computation gave the same bits: of the output in forward, of all gradients in forward + backward.
- Times are medians over repetitions in which the providers took turns. Ratios are formed round by round; in
  brackets stand the 20th and 80th percentile. On a CPU `time` is what a person waits. On a GPU it is the time between
  events round one call with cold caches, the launches queued ahead (a call that waits for the CPU shows its gaps);
  `wall` is what a person waits for one eager call, `graph` a replay in a CUDA graph with warm caches.
- A claim `holds` or `does not hold` where the interval in which the median ratio lies with 95 % certainty is on one
  side of the limit. Where it is on both, where single ratios are all over the place, or where the machine changed its
  speed meanwhile, the verdict is `cannot tell`.
- Memory is the peak above the inputs, results included, from the allocator's own events.
- The floor is the least traffic over the measured copy bandwidth, or the least FLOPs over the measured rate of a
  matrix product, whichever is longer; in brackets, how much of the time it explains.
"""
