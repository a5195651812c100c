"""Rows of `results.jsonl`, one for each measurement, and reading them back."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .measure import Summary, summarise

CHECKS = ("error", "repeats")  # of the results; repeats: 1 = a second computation gave the same bits, 0 = it did not
METRICS = ("time_ms", "wall_ms", "graph_ms", "peak_bytes", *CHECKS)


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
    value: float  # the median of the samples
    samples: list[float]

    @property
    def key(self) -> tuple[str, ...]:
        return (self.subject, self.scope, self.case, self.provider, self.device, self.dtype, self.mode, self.metric)

    @property
    def summary(self) -> Summary:
        return summarise(self.samples)


def write(path: Path, rows: Iterable[Row], facts: dict) -> None:
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps({**asdict(row), **facts}) + "\n")


def read(folder: Path) -> tuple[list[Row], dict]:
    """The rows of an earlier run and its facts."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise ResultsError(f"{folder} holds no results.jsonl")
    fields = Row.__dataclass_fields__
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [Row(**{name: record[name] for name in fields}) for record in records]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not a benchmark's result: {error}") from error
    if not rows:
        raise ResultsError(f"{path} is empty")
    return rows, {name: value for name, value in records[0].items() if name not in fields}


class Table:
    """Rows by what they measure."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        self._by_place = {(r.scope, r.case, r.provider, r.mode, r.metric): r for r in self.rows}

    def get(self, scope: str, case: str, provider: str, mode: str, metric: str) -> Row | None:
        return self._by_place.get((scope, case, provider, mode, metric))
