"""Rows of `results.jsonl`, one for each measurement: written as they come, and read back with every value checked."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .measure import Summary, disturbed, summarise

CHECKS = ("error", "repeats")  # of the results; repeats: 1 = a second computation gave the same bits, 0 = it did not
TIMES = ("time_ms", "wall_ms", "graph_ms")
MACHINE_CODE = ("registers", "spilled_bytes", "shared_bytes", "instructions", "loop_instructions", "programs", "share")
METRICS = (*TIMES, "peak_bytes", *CHECKS, "call_us", *MACHINE_CODE)
FILE = "results.jsonl"


class ResultsError(ValueError):
    """A folder does not hold results. The message says what is wrong with it."""


@dataclass(frozen=True)
class Row:
    subject: str
    scope: str
    case: str
    provider: str
    device: str
    dtype: str
    mode: str
    metric: str
    value: float  # the median of the samples, unless the metric says otherwise
    samples: list[float]

    @property
    def key(self) -> tuple[str, ...]:
        return (self.subject, self.scope, self.case, self.provider, self.device, self.dtype, self.mode, self.metric)

    @property
    def summary(self) -> Summary:
        return summarise(self.samples)


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
    """Everything a run found out. `floors` in ms by (scope, case, provider, mode), `keys` by (case, provider).

    `on_row` is called with each row as it comes.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    floors: dict[tuple[str, str, str, str], float] = field(default_factory=dict)
    keys: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    on_row: Callable[[Row], None] = lambda row: None

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.on_row(row)

    def skip(self, skipped: Skipped) -> None:
        if skipped not in self.skipped:
            self.skipped.append(skipped)

    @property
    def wrong(self) -> list[Skipped]:
        return [skipped for skipped in self.skipped if skipped.wrong]


class Table:
    """Rows by what they measure."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        self._by_place = {(r.scope, r.case, r.provider, r.mode, r.metric): r for r in self.rows}

    def get(self, scope: str, case: str, provider: str, mode: str, metric: str) -> Row | None:
        return self._by_place.get((scope, case, provider, mode, metric))

    def disturbed(self, scope: str, case: str, mode: str, metric: str) -> bool:
        """Whether the machine changed its speed while the providers took turns here."""
        place = (scope, case, mode, metric)
        return disturbed(row.samples for row in self.rows if (row.scope, row.case, row.mode, row.metric) == place)


def append(file, row: Row, facts: dict) -> None:
    """One line, on the disk when this returns."""
    file.write(json.dumps({**asdict(row), **facts}) + "\n")
    file.flush()


def read(folder: Path) -> tuple[list[Row], dict]:
    """The rows of an earlier run and its facts; raises ResultsError where any value is not what it should be."""
    path = folder / FILE
    if not path.is_file():
        raise ResultsError(f"{folder} holds no {FILE}")
    records = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append((_row(record), record))
        except (ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ResultsError(f"{path}, line {number} is not a benchmark's result: {what}") from error
    if not records:
        raise ResultsError(f"{path} is empty")
    first = records[0][1]
    facts = {name: value for name, value in first.items() if name not in Row.__dataclass_fields__}
    for name in ("hardware", "versions"):
        if not isinstance(facts.get(name), dict):
            raise ResultsError(f"{path} does not say on what {name} it was measured")
    return [row for row, _ in records], facts


def _row(record: dict) -> Row:
    row = Row(**{name: record[name] for name in Row.__dataclass_fields__})
    for name in ("subject", "scope", "case", "provider", "device", "dtype", "mode"):
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is {record[name]!r}, needs text")
    if row.metric not in METRICS:
        raise ValueError(f"metric is {row.metric!r}, needs one of {', '.join(METRICS)}")
    if not isinstance(row.samples, list) or not row.samples:
        raise TypeError(f"samples are {row.samples!r}, need a list of numbers")
    for value in (row.value, *row.samples):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # a wrong result may be infinitely wrong
        if not is_number or value < 0 or not (math.isfinite(value) or (row.metric == "error" and value > 0)):
            raise ValueError(f"{row.metric} has the value {value!r}, needs a number of 0 or more")
    return row
