"""Sums up an nsys trace by range.

`nsys export --type sqlite REPORT.nsys-rep`, then `python bench/nsys_summary.py REPORT.sqlite`. A kernel belongs to
every range of the domain `rigfuse` that was open when it was launched, on the thread that launched it.
"""

import sqlite3
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rigfuse.bench.report import number
from rigfuse.kernels.runtime.nvtx import DOMAIN
from rigfuse.train.command_line import Parser, TextTable, console, in_one_line

# values of NVTX_EVENTS.eventType in nsys' schema
_PUSH_POP, _DOMAIN_CREATE = 59, 75
_PROCESS = ~0xFFFFFF  # globalTid without its lowest 24 bits is the process, as in globalPid


class TraceError(ValueError):
    """The file is no nsys export, or there is nothing to sum up. One line."""


@dataclass
class Range:
    """What happened in all ranges of one name. Times in ns."""

    name: str
    calls: int = 0
    wall: int = 0
    kernels: int = 0
    gpu: int = 0


def summarise(path: Path) -> list[Range]:
    """The ranges of the trace, the one with the most GPU time first."""
    if not path.is_file():
        raise TraceError(f"{path} is not a file")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            ranges, launches = _ranges(database), _launches(database)
    except sqlite3.DatabaseError as error:
        raise TraceError(f"{path} is not an sqlite export of nsys: {error}") from error
    if not ranges:
        raise TraceError(f"{path} has no NVTX range of the domain {DOMAIN}; profile with -t cuda,nvtx")
    summary = {}
    for thread in ranges:
        _sum_up(ranges[thread], launches.get(thread, []), summary)
    return sorted(summary.values(), key=lambda entry: -entry.gpu)


def _tables(database):
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _ranges(database):
    """thread → [(start, end, name)] of the domain's push–pop ranges."""
    if "NVTX_EVENTS" not in _tables(database):
        return {}
    # a text stands in the row itself or, being used more than once, in StringIds
    texts = "SELECT e.*, COALESCE(e.text, s.value) AS name FROM NVTX_EVENTS e LEFT JOIN StringIds s ON s.id = e.textId"
    rows = database.execute(
        f"WITH named AS ({texts}), "
        "domains AS (SELECT domainId, globalTid & ? AS process FROM named WHERE eventType = ? AND name = ?) "
        "SELECT globalTid, start, end, name FROM named "
        "WHERE eventType = ? AND end IS NOT NULL AND (domainId, globalTid & ?) IN domains ORDER BY start, end DESC",
        (_PROCESS, _DOMAIN_CREATE, DOMAIN, _PUSH_POP, _PROCESS),
    )
    ranges = defaultdict(list)
    for thread, start, end, name in rows:
        ranges[thread].append((start, end, name))
    return ranges


def _launches(database):
    """thread → [(time of the launch, duration of the kernel)]."""
    launches = defaultdict(list)
    if not {"CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"} <= _tables(database):
        return launches
    rows = database.execute(
        "SELECT r.globalTid, r.start, k.end - k.start FROM CUPTI_ACTIVITY_KIND_KERNEL k "
        "JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = k.correlationId AND r.globalTid & ? = k.globalPid "
        "ORDER BY r.start",
        (_PROCESS,),
    )
    for thread, start, duration in rows:
        launches[thread].append((start, duration))
    return launches


def _sum_up(ranges, launches, summary):
    """Walks one thread's ranges and launches in the order of time."""
    for start, end, name in ranges:
        entry = summary.setdefault(name, Range(name))
        entry.calls += 1
        entry.wall += end - start
    pending, open_ranges = list(reversed(ranges)), []
    for time, duration in launches:
        while pending and pending[-1][0] <= time:
            open_ranges.append(pending.pop())
        open_ranges = [entry for entry in open_ranges if entry[1] >= time]
        for name in {name for _, _, name in open_ranges}:  # once, however often the name is nested in itself
            summary[name].kernels += 1
            summary[name].gpu += duration


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="nsys_summary.py")
    parser.add_argument("report", type=Path, metavar="REPORT.sqlite")
    with in_one_line("nsys_summary.py", TraceError):
        ranges = summarise(parser.parse_args(argv).report)
    columns = ["range", "calls", "kernels a call", "GPU ms a call", "wall ms a call", "GPU ms in all"]
    table = TextTable(f"Ranges of the domain {DOMAIN}", columns, left=1)
    for entry in ranges:
        each = (entry.kernels / entry.calls, entry.gpu / entry.calls / 1e6, entry.wall / entry.calls / 1e6)
        table.rows.append([entry.name, str(entry.calls), *map(number, each), number(entry.gpu / 1e6)])
    table.print(console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
