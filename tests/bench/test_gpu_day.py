"""The one command for a GPU, as far as a CPU can follow it: order, time limits, what is kept, what is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from rigfuse.bench import gpu_day, in_turn
from rigfuse.bench.gpu_day import Day, Part
from rigfuse.bench.operations import OPERATIONS

ROOT = Path(gpu_day.__file__).parents[1]
PYTHON = sys.executable


@pytest.fixture
def day(tmp_path):
    out = tmp_path / "day"
    out.mkdir()
    return Day(out, "cuda", None, dict(os.environ))


def outcomes(day, monkeypatch, **statuses):
    """Replaces the parts by some that only say that they ran; those with a status of 1 are red."""
    ran, day.device = [], "cpu"

    def make(name):
        def part(day, part, seconds):
            ran.append((name, seconds))
            (day.out / f"{name}.txt").write_text(name)
            part.red = statuses.get(name) == 1

        return part

    monkeypatch.setattr(gpu_day, "PARTS", {name: make(name) for name in gpu_day.PARTS})
    return ran


def archived(day):
    with tarfile.open(f"{day.out}.tar.gz") as file:
        return {name.removeprefix("day/") for name in file.getnames()}


def test_parts_come_in_order_and_each_is_packed(day, monkeypatch, capsys):
    ran = outcomes(day, monkeypatch)
    packed = []
    write_down = gpu_day.write_down
    monkeypatch.setattr(gpu_day, "write_down", lambda day: (write_down(day), packed.append(archived(day))))
    assert gpu_day.spend(day, list(gpu_day.PARTS), go_on=False, minutes=10) == 0
    assert [name for name, _ in ran] == ["tests", "operations", "compare", "sanitizer", "profile"]
    assert dict(ran) == pytest.approx(gpu_day.SECONDS, rel=0.01)
    for number, files in enumerate(packed, 1):
        assert {f"{name}.txt" for name, _ in ran[:number]} == {name for name in files if name.endswith(".txt")}
        assert "day.md" in files
    assert "at most 180 s" in capsys.readouterr().out


@pytest.mark.parametrize("go_on, left", [(False, []), (True, ["operations", "compare", "sanitizer", "profile"])])
def test_a_red_test_ends_the_day(go_on, left, day, monkeypatch):
    ran = outcomes(day, monkeypatch, tests=1)
    assert gpu_day.spend(day, list(gpu_day.PARTS), go_on, minutes=10) == 1
    assert [name for name, _ in ran] == ["tests", *left]
    assert ("left out: a test failed" in (day.out / "day.md").read_text()) != go_on


def test_no_part_begins_that_has_no_time(day, monkeypatch):
    ran = outcomes(day, monkeypatch)
    assert gpu_day.spend(day, ["tests", "compare"], go_on=False, minutes=0.3) == 0
    assert [name for name, _ in ran] == [] and "no time left" in (day.out / "day.md").read_text()


def test_an_interrupted_day_is_packed(day, monkeypatch):
    outcomes(day, monkeypatch)

    def interrupt(day, part, seconds):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_day.PARTS, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gpu_day.spend(day, list(gpu_day.PARTS), go_on=False, minutes=10)
    assert {"operations.txt", "day.md"} <= archived(day)
    assert (day.out / "day.md").read_text().endswith("- interrupted\n")


def is_alive(pid):
    """Whether a process runs; one that ended and that nobody asked about does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_command_is_ended_by_its_limit_and_keeps_what_it_had(day):
    """As Ctrl-C would end it, with all that it started; also where the shell made it ignore Ctrl-C."""
    script = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True)\n"
        "try:\n    time.sleep(1000)\nexcept KeyboardInterrupt:\n    print('kept', flush=True)"
    )
    start = time.monotonic()
    assert day.run([PYTHON, "-c", script], "some.log", 1.5) is None
    assert time.monotonic() - start < gpu_day.ENDS_IN
    child, kept = (day.out / "some.log").read_text().split()
    for _ in range(100):  # it is told to end at once, and ends when the machine comes to it
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert kept == "kept" and not is_alive(child)
    assert day.run([PYTHON, "-c", "raise SystemExit(3)"], "other.log", 60) == 3


@pytest.mark.parametrize(
    "script, red, said",
    [
        ("print('3 passed')", False, "done"),
        ("print('FAILED tests/a.py::test_b - assert 1 == 2'); raise SystemExit(1)", True, "FAILED tests/a.py::test_b"),
        ("import time; print('3 passed', flush=True); time.sleep(60)", False, "time limit"),
        ("import time; print('ERROR tests/a.py', flush=True); time.sleep(60)", True, "ERROR tests/a.py"),
        ("raise SystemExit(5)", True, "exit status 5"),
    ],
    ids=["green", "failed", "unfinished", "unfinished but failed", "nothing collected"],
)
def test_what_makes_the_tests_red(script, red, said, day, monkeypatch):
    monkeypatch.setattr(day, "pytest", lambda arguments, log, seconds: day.run([PYTHON, "-c", script], log, seconds))
    part = Part("tests")
    gpu_day.run_tests(day, part, 2.0)
    assert part.red == red and any(said in line for line in part.lines)


def test_every_operation_is_measured_and_what_has_to_be_compiled_comes_last(day, monkeypatch):
    asked, part = [], Part("operations")
    monkeypatch.setattr(day, "bench_in_turn", lambda commands, log, seconds: asked.append(commands) or [0, 130, 1])
    gpu_day.run_operations(day, part, 240.0)
    (commands,) = asked
    names = [words[1] for words in commands]
    first, second = names[: len(OPERATIONS)], names[len(OPERATIONS) :]
    assert first == list(OPERATIONS) and set(second) == set(OPERATIONS)
    for words in commands:
        peers, cases = words[words.index("--peers") + 1 :], words[words.index("--case") + 1 : words.index("--quick")]
        assert set(peers) <= set(OPERATIONS[words[1]].all_peers) and tuple(cases) == OPERATIONS[words[1]].that_matter
        assert ("/compiled/" in words[words.index("--out") + 1]) == bool({"compile", "flex"} & set(peers))
    outcomes = [line.rpartition(": ")[2] for line in part.lines]
    assert outcomes[:4] == ["done", "ended by its time limit, what it had is kept", "exit status 1", "no time left"]
    assert len(outcomes) == len(commands)
    day.peers = ["sdpa"]
    gpu_day.run_operations(day, Part("operations"), 240.0)
    assert [words[1] for words in asked[1]] == list(OPERATIONS)
    assert {word for words in asked[1] for word in words[words.index("--peers") + 1 :]} == {"sdpa"}


@pytest.fixture
def pretended(monkeypatch):
    """Replaces bench/run.py: a command says what it does, and takes the seconds that it is given."""
    ran = []

    def main(command):
        ran.append(command[0])
        if command[0] == "fails":
            raise RuntimeError("an illegal memory access was encountered")
        try:
            time.sleep(float(command[1]))
        except KeyboardInterrupt:
            return 130
        return 0

    monkeypatch.setattr(in_turn.run, "main", main)
    monkeypatch.setattr(in_turn, "LEAST", 0.01)
    return ran


def test_commands_share_the_time_and_the_first_failure_ends_them(pretended):
    statuses, commands = [], [["quick", 0], ["slow", 60], ["quick", 0]]
    in_turn.run_in_turn(commands, 1.0, statuses.append)
    assert statuses == [0, 130, 0] and pretended == ["quick", "slow", "quick"]
    in_turn.run_in_turn([["quick", 0], ["fails"], ["quick", 0]], 1.0, statuses.append)
    assert statuses[3:] == [0, 1] and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    in_turn.run_in_turn(commands, 0.001, statuses.append)
    assert len(statuses) == 5


@pytest.mark.parametrize(
    "told, ended, expected",
    [
        ([[0, 0, 0]], [0], [0, 0, 0]),
        ([[0, 1], [0]], [0, 0], [0, 1, 0]),  # a new process after a failure
        ([[0], []], [0, 0], [0]),  # no time left
        ([[0]], [None], [0]),
        ([[]], [None], [130]),
        ([[], [0, 0]], [1, 0], [1, 0, 0]),  # an error before it began
    ],
)
def test_a_process_for_all_commands_and_a_new_one_after_a_failure(told, ended, expected, day, monkeypatch):
    runs = iter(zip(told, ended))

    def run(command, log, seconds):
        statuses, status = next(runs)
        Path(command[4]).write_text("".join(f"{number}\n" for number in statuses))
        return status

    monkeypatch.setattr(day, "run", run)
    assert day.bench_in_turn([["a"], ["b"], ["c"]], "log", 60.0) == expected and next(runs, None) is None


def test_the_slowest_operations_are_profiled(day, monkeypatch):
    def results(name, case, provider, value):
        row = dict(subject=name, scope="operation", case=case, provider=provider, device="cuda", dtype="bfloat16")
        row |= dict(mode="fwd", metric="time_ms", value=value, samples=[value], hardware={}, versions={})
        folder = day.out / "operations" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    for name, case, value in (("fusion", "a", 1.0), ("warp", "b", 3.0), ("warp", "c", 5.0), ("softmax", "d", 2.0)):
        results(name, case, "rigfuse", value)
        results(name, case, "eager", 100.0 - value)
    (day.out / "operations" / "broken").mkdir()
    slowest = [("warp", "c"), ("softmax", "d"), ("fusion", "a")]
    assert gpu_day.slowest_operations(day.out / "operations") == slowest
    commands = []
    monkeypatch.setattr(day, "run", lambda command, log, seconds: commands.append([str(word) for word in command]) or 0)
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: f"/bin/{name}")
    gpu_day.run_profile(day, Part("profile"), 60.0)
    after = lambda command, word: command[command.index(word) + 1]  # noqa: E731
    assert [(after(command, "--op"), after(command, "--case")) for command in commands] == slowest
    assert all((command[0], after(command, "--clock-control")) == ("/bin/ncu", "none") for command in commands)
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: None)
    part = Part("profile")
    gpu_day.run_profile(day, part, 60.0)
    assert part.lines == ["ncu is not installed"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--out", "day"), "finds no CUDA device here; --rehearse tries what needs none"),
        (("--out", "day", "--parts", "test"), "no part 'test'; did you mean 'tests'?"),
        (("--out", "day", "--peers", "flx"), "no peer 'flx'; did you mean 'flex'?"),
        (("--out", ".", "--rehearse"), "exists already; choose a new folder"),
        ((), "--out"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = list(sys.path)
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main(list(arguments))
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and sys.path == before
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_rehearsal_from_a_bare_checkout(tmp_path):
    """A copy of the files where nothing is installed or on the path; one part, in a process of its own."""
    ignore = shutil.ignore_patterns(".*", "runs", "work_dirs", "results", "__pycache__", "build", "tests")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignore)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= dict(RIGFUSE_COMMIT="0123456789ab", GIT_CEILING_DIRECTORIES=str(tmp_path))
    (tmp_path / "site").mkdir()  # what a GPU machine may lack
    absent = "import sys; sys.modules.update(dict.fromkeys(['shapely', 'nuscenes', 'motmetrics', 'nvtx']))"
    (tmp_path / "site" / "sitecustomize.py").write_text(absent)
    environment["PYTHONPATH"] = str(tmp_path / "site")
    command = [PYTHON, "checkout/bench/gpu_day.py", "--rehearse", "--out", "day", "--minutes", "60", "--parts"]
    where = dict(cwd=tmp_path, env=environment)
    done = subprocess.run([*command, "compare", "sanitizer"], **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "day" / "day.md").read_text()
    assert "commit 0123456789ab (not verified)" in text and "- done" in text and "- needs a CUDA device" in text
    assert "| tiny | v2-sdpa |" in (tmp_path / "day" / "compare" / "report.md").read_text()
    with tarfile.open(tmp_path / "day.tar.gz") as file:
        assert "day/compare/results.jsonl" in file.getnames()
