"""The summary of an nsys trace, on a small database with the columns of nsys' own schema."""

import sqlite3

import pytest

from rigfuse.bench.nsys_summary import TraceError, main, summarise

PROCESS = 7 << 24
MAIN, AUTOGRAD = PROCESS | 1, PROCESS | 2
OURS, OTHERS = 1, 2

SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, category INTEGER, color INTEGER,
    text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL);
"""


class Trace:
    def __init__(self, path):
        self.path, self.database, self.launches = path, sqlite3.connect(path), 0
        self.database.executescript(SCHEMA)
        self.database.execute("INSERT INTO StringIds VALUES (10, 'warp'), (11, 'rigfuse'), (12, 'kernel')")
        for domain, text, text_id in ((OURS, None, 11), (OTHERS, "another", None)):
            self._event(0, None, 75, text, text_id, MAIN, domain)

    def _event(self, start, end, kind, text, text_id, thread, domain):
        row = (start, end, kind, None, None, None, text, thread, None, text_id, domain, None)
        self.database.execute(f"INSERT INTO NVTX_EVENTS VALUES ({', '.join('?' * 12)})", row)

    def range(self, start, end, text=None, text_id=None, thread=MAIN, domain=OURS):
        self._event(start, end, 59, text, text_id, thread, domain)

    def kernel(self, launched, duration, thread=MAIN):
        """A kernel that runs long after the range that launched it has closed."""
        self.launches += 1
        runtime = (launched, launched + 1, 0, thread, self.launches, 12, 0, None)
        self.database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?, ?, ?, ?)", runtime)
        kernel = (launched + 10_000, launched + 10_000 + duration, 0, 1, 7, self.launches, PROCESS, 12, 12)
        self.database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", kernel)

    def summary(self):
        self.database.commit()
        return {entry.name: (entry.calls, entry.wall, entry.kernels, entry.gpu) for entry in summarise(self.path)}


@pytest.fixture
def trace(tmp_path):
    return Trace(tmp_path / "report.sqlite")


def test_kernels_belong_to_the_ranges_that_launched_them(trace):
    trace.range(100, 500, "stage")
    trace.range(150, 250, text_id=10)  # "warp", inside the stage
    trace.range(300, 400, text_id=10)
    trace.kernel(160, 30)
    trace.kernel(310, 50)
    trace.kernel(450, 7)  # in the stage only
    trace.kernel(600, 1000)  # in no range
    assert trace.summary() == {"stage": (1, 400, 3, 87), "warp": (2, 200, 2, 80)}


def test_threads_and_domains_are_kept_apart(trace):
    trace.range(100, 500, "forward")
    trace.range(100, 500, "backward", thread=AUTOGRAD)
    trace.range(100, 500, "somebody else's", domain=OTHERS)
    trace.kernel(200, 5)
    trace.kernel(200, 11, thread=AUTOGRAD)
    assert trace.summary() == {"forward": (1, 400, 1, 5), "backward": (1, 400, 1, 11)}


def test_a_range_nested_in_its_own_name_counts_a_kernel_once(trace):
    trace.range(100, 500, "stage")
    trace.range(200, 400, "stage")
    trace.kernel(300, 9)
    assert trace.summary() == {"stage": (2, 600, 1, 9)}


def test_the_command_prints_a_table(trace, capsys):
    trace.range(0, 2_000_000, "stage")
    trace.kernel(10, 1_500_000)
    trace.summary()
    assert main([str(trace.path)]) == 0
    assert "stage" in (text := capsys.readouterr().out) and "1.5" in text


def test_what_is_no_trace_gets_one_line(trace, tmp_path, capsys):
    with pytest.raises(TraceError, match="no NVTX range"):
        summarise(trace.path)
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 20)
    for name in ("text", "absent"):
        with pytest.raises(SystemExit, match="1"):
            main([str(tmp_path / name)])
        assert capsys.readouterr().err.count("\n") == 1
