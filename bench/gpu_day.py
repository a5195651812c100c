"""Spends ten minutes on a GPU well: tests, measurements, memory checks, a profile, packed after each part.

    python3 bench/gpu_day.py --out runs/gpu

Works from a bare checkout: nothing of this project need be installed. What is right comes first; where a test fails the
rest is left out. Each part has its time; what it measured until then is kept.

tests       the operations on the GPU, in parallel
operations  each against its peers, at the sizes that matter; those peers that have to be compiled come last
compare     V1 and V2, on this toolkit's operations and without
sanitizer   compute-sanitizer on every operation
profile     the slowest operations' kernels, by Nsight Compute

FOLDER gets day.md, logs and results; FOLDER.tar.gz is the same in one file. Without a repository RIGFUSE_COMMIT names
the commit. --rehearse does on a CPU what can be done there.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = dict(tests=180, operations=240, compare=150, sanitizer=90, profile=60)  # at most, of ten minutes
ENDS_IN = 15  # seconds that a command gets to write down what it has
LEAST = 5  # seconds with which it is worth to begin
INTERRUPTED = 130  # exit status
PROFILED = 3  # operations
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")


@dataclass
class Part:
    """What a part did: one line for each command."""

    name: str
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    red: bool = False


@dataclass
class Day:
    """Where the results go, and how commands are run."""

    out: Path
    device: str
    peers: list[str] | None
    environment: dict[str, str]
    parts: list[Part] = field(default_factory=list)

    def run(self, command: list[str], log: str, seconds: float) -> int | None:
        """Runs a command, its output in `log`; None where it was ended after `seconds`, as by Ctrl-C."""
        path = self.out / log
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)

    def bench(self, arguments: list[str], log: str, seconds: float) -> int | None:
        return self.run([sys.executable, ROOT / "bench" / "run.py", *arguments], log, seconds)

    def bench_in_turn(self, commands: list[list[str]], log: str, seconds: float) -> list[int]:
        """Runs bench/run.py with each of these arguments; returns the exit status of those that were begun.

        One process for all, and a new one after a failure: the next command on a broken device would fail too.
        """
        plan, told, end = self.out / "commands.json", self.out / "statuses.txt", time.time() + seconds
        done: list[int] = []
        while len(done) < len(commands) and (left := end - time.time()) > LEAST:
            plan.write_text(json.dumps(commands[len(done) :]))
            told.write_text("")
            status = self.run([sys.executable, ROOT / "bench" / "in_turn.py", plan, end, told], log, left + ENDS_IN)
            begun = [int(line) for line in told.read_text().split()]
            if not begun and status != 0:  # it was ended in its first command, or could not begin
                begun = [INTERRUPTED if status is None else status]
            done += begun
            if not begun or status is None:
                break
        return done

    def pytest(self, arguments: list[str], log: str, seconds: float) -> int | None:
        workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"] if _installed("xdist") else []
        command = [sys.executable, "-m", "pytest", "--gpu", "tests/kernels", "-rfE", "-p", "no:cacheprovider"]
        # What newer packages deprecate is no failure of today. And a folder named kernels must not be on the path.
        self.environment["PYTHONSAFEPATH"] = "1"
        return self.run([*command, "-W", "default", *workers, *arguments], log, seconds)


def _end(process) -> None:
    """Ends a command and all that it started; gives it time to write down what it has."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDS_IN)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _installed(package):
    from importlib.util import find_spec

    return find_spec(package) is not None


def _outcome(status: int | None) -> str:
    return {0: "done", None: "ended by its time limit, what it had is kept"}.get(status, f"exit status {status}")


# ---- the parts; each gets the seconds that it may take


def run_tests(day: Day, part: Part, seconds: float) -> None:
    if day.device == "cpu":
        status = day.pytest(["--collect-only", "-q"], "tests.log", seconds)
        part.lines.append(f"collecting the GPU tests: {_outcome(status)}")
        part.red = status != 0
        return
    status = day.pytest(["-k", "not sanitizer", "--maxfail", "20"], "tests.log", seconds)
    log = (day.out / "tests.log").read_text(errors="replace")
    failed = [line for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    part.red = bool(failed) or status not in (0, None)
    part.lines += [_outcome(status), *failed]


def run_operations(day: Day, part: Part, seconds: float) -> None:
    """Every operation beside what need not be compiled, then beside what must be: a compiler may take all the time."""
    from rigfuse.bench.operation import COMPILED
    from rigfuse.bench.operations import OPERATIONS

    names, commands = [], []
    for compiled in (False, True):
        for operation in OPERATIONS.values():
            peers = [name for name in operation.all_peers if (name in COMPILED) == compiled]
            peers = [name for name in peers if day.peers is None or name in day.peers]
            if peers or not compiled:
                cases = operation.that_matter if day.device == "cuda" else ("tiny",)
                out = day.out / ("compiled" if compiled else "operations") / operation.name
                what = ["--op", operation.name, "--case", *cases, "--quick", "--device", day.device]
                commands.append([*what, "--out", str(out), "--peers", *peers])
                names.append(f"{operation.name} with {', '.join(peers) or 'no peer'}")
    statuses = day.bench_in_turn(commands, "operations.log", seconds)
    begun = [_outcome(None if status == INTERRUPTED else status) for status in statuses]
    part.lines += [f"{name}: {what}" for name, what in itertools.zip_longest(names, begun, fillvalue="no time left")]


def run_compare(day: Day, part: Part, seconds: float) -> None:
    from rigfuse.bench.subjects.compare import PROVIDERS

    cases = ("documents", "upstream", "documents-t4", "documents-b4", "upstream-fine", "fine")
    what = ("--case", *cases) if day.device == "cuda" else ("--case", "tiny", "--scope", "attention", "temporal")
    command = ["--compare", *PROVIDERS, *what, "--quick", "--device", day.device]
    status = day.bench([*command, "--out", day.out / "compare"], "compare.log", seconds)
    part.lines.append(_outcome(status))


def run_sanitizer(day: Day, part: Part, seconds: float) -> None:
    if day.device == "cpu" or shutil.which("compute-sanitizer") is None:
        part.lines.append("compute-sanitizer is not installed" if day.device == "cuda" else "needs a CUDA device")
        return
    part.lines.append(_outcome(day.pytest(["-k", "sanitizer"], "sanitizer.log", seconds)))


def run_profile(day: Day, part: Part, seconds: float) -> None:
    """The operations whose own time is the longest, at the case where it is."""
    ncu = shutil.which("ncu")
    if day.device == "cuda" and ncu is None:
        part.lines.append("ncu is not installed")
        return
    slowest = slowest_operations(day.out / "operations")[:PROFILED]
    end = time.monotonic() + seconds
    for number, (name, case) in enumerate(slowest):
        command = ["--op", name, "--case", case, "--device", day.device, "--profile", "--peers"]
        command += [] if day.device == "cuda" else ["--out", day.out / "profile" / name]
        command = [sys.executable, ROOT / "bench" / "run.py", *command]
        if day.device == "cuda":
            command = [*profiler(ncu, day.out / "profile" / f"{name}.csv"), *command]
        status = day.run(command, f"profile/{name}.log", (end - time.monotonic()) / (len(slowest) - number))
        part.lines.append(f"{name} at {case}: {_outcome(status)}")
    if not slowest:
        part.lines.append("no operation was measured")


def profiler(ncu: str, table: Path) -> list[str]:
    """Nsight Compute on triton's kernels alone: their names have neither types nor namespaces."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", r"regex:^[a-z][a-z0-9_]*$", "--launch-count", "40"]
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", *kernels, *sections]
    return [*command, "--csv", "--log-file", str(table)]


def slowest_operations(folder: Path) -> list[tuple[str, str]]:
    """(operation, case), the longest forward + backward first, each operation once."""
    from rigfuse.bench.operation import TOOLKIT
    from rigfuse.bench.results import ResultsError, read

    longest = {}
    for results in sorted(folder.glob("*/")):
        with contextlib.suppress(ResultsError):
            times = [row for row in read(results)[0] if (row.provider, row.metric) == (TOOLKIT, "time_ms")]
            if times:
                row = max(times, key=lambda row: row.value)
                longest[row.subject] = (row.value, row.case)
    return [(name, case) for name, (_, case) in sorted(longest.items(), key=lambda item: -item[1][0])]


PARTS: dict[str, Callable[[Day, Part, float], None]] = dict(
    tests=run_tests,
    operations=run_operations,
    compare=run_compare,
    sanitizer=run_sanitizer,
    profile=run_profile,
)


# ---- the day


def write_down(day: Day) -> None:
    """day.md, and everything so far in one archive; the last archive stays until the new one is whole."""
    import torch

    from rigfuse.bench import facts

    found = facts.collect(torch.device(day.device))
    title = "Ten minutes on a GPU" if day.device == "cuda" else "A rehearsal on a CPU"
    lines = [f"# {title}", "", facts.headline(found), ""]
    lines += [line for line in (facts.warning(found),) if line]
    for part in day.parts:
        lines += ["", f"## {part.name}, {part.seconds:.0f} s{', red' if part.red else ''}", ""]
        lines += [f"- {line}" for line in part.lines]
    (day.out / "day.md").write_text("\n".join(lines) + "\n")
    archive = Path(f"{day.out}.tar.gz")
    partial = archive.with_name(f".{archive.name}.partial")
    with tarfile.open(partial, "w:gz") as file:
        file.add(day.out, arcname=day.out.name)
    partial.replace(archive)


def spend(day: Day, parts: list[str], go_on: bool, minutes: float) -> int:
    """Runs the parts, each as long as it may; the exit status says whether the tests were green."""
    end = time.monotonic() + 60 * minutes
    for name in parts:
        part, start = Part(name), time.monotonic()
        day.parts.append(part)
        seconds = min(SECONDS[name] * minutes / 10, end - start - ENDS_IN)
        red = any(part.red for part in day.parts)
        try:
            if red and not go_on:
                part.lines.append("left out: a test failed")
            elif seconds < LEAST:
                part.lines.append("left out: no time left")
            else:
                print(f"{name}: at most {seconds:.0f} s", flush=True)
                PARTS[name](day, part, seconds)
        except KeyboardInterrupt:
            part.lines.append("interrupted")
            raise
        finally:
            part.seconds = time.monotonic() - start
            write_down(day)
            print("\n".join(f"  {line}" for line in part.lines), flush=True)
    return int(any(part.red for part in day.parts))


def parse(arguments: list[str] | None):
    import torch

    from rigfuse.bench.operations import OPERATIONS
    from rigfuse.kernels.runtime.extras import require
    from rigfuse.train.command_line import Parser, UsageError, check_new, choose

    require("dev", "pytest")
    parser = Parser(__doc__, prog="gpu_day.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="only these beside each operation (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: 10)")
    parser.add_argument("--go-on", action="store_true", help="measure although a test failed")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at the smallest sizes")
    chosen = parser.parse_args(arguments)
    for part in chosen.parts or ():
        choose("part", part, PARTS)
    known = dict.fromkeys(peer for operation in OPERATIONS.values() for peer in operation.all_peers)
    for peer in chosen.peers or ():
        choose("peer", peer, known)
    if not chosen.rehearse and not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} finds no CUDA device here; --rehearse tries what needs none")
    chosen.out = check_new("--out", chosen.out.absolute())
    return chosen


@contextlib.contextmanager
def importable():
    """Makes this checkout the package rigfuse, here and in what is started, and yields the environment for that."""
    folder = Path(tempfile.mkdtemp(prefix="rigfuse-"))
    (folder / "rigfuse").symlink_to(ROOT)
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    try:
        yield {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    finally:
        sys.path[:] = before
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> int:
    with importable() as environment:
        from rigfuse.bench.run import terminated_like_ctrl_c
        from rigfuse.train.command_line import in_one_line

        with in_one_line("gpu_day.py"), terminated_like_ctrl_c():
            chosen = parse(arguments)
            chosen.out.mkdir(parents=True, exist_ok=True)
            day = Day(chosen.out, "cpu" if chosen.rehearse else "cuda", chosen.peers, environment)
            order = [name for name in PARTS if name in (chosen.parts or PARTS)]
            status = spend(day, order, chosen.go_on, chosen.minutes)
            print(f"written to {day.out} and {day.out}.tar.gz")
            return status


if __name__ == "__main__":
    sys.exit(main())
