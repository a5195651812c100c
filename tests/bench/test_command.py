"""The command from end to end on a tiny case, and what it says to mistakes."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rigfuse import kernels
from rigfuse.bench import facts, geometry, implementations, measure, operation, options, run, subject
from rigfuse.bench.claims import Judged
from rigfuse.bench.measure import Effort
from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.results import METRICS
from rigfuse.bench.subjects import SUBJECTS, compare
from rigfuse.modules.rig import Rig
from rigfuse.train import claims
from rigfuse.train.data import Drive, builtin_drives


@pytest.fixture(autouse=True)
def little_effort(monkeypatch):
    monkeypatch.setattr(options, "QUICK", Effort(seconds=0.0, least=2))


def command(*arguments):
    return run.main(["--quick", "--case", "tiny", "--device", "cpu", *map(str, arguments)])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_compare_writes_results_a_report_and_a_picture(tmp_path, capsys):
    out = tmp_path / "runs" / "first"
    assert command("--compare", "v1", "v2", "--out", out) == 0
    rows = rows_of(out)
    measured = {(row["scope"], row["provider"], row["mode"], row["metric"]) for row in rows}
    for scope in compare.SCOPES:
        for provider in ("v1", "v2"):
            for mode in ("step",) if scope == "step" else ("fwd", "fwd-bwd"):
                for metric in ("time_ms", "peak_bytes", "error", "repeats"):
                    assert (scope, provider, mode, metric) in measured
    assert {row["metric"] for row in rows} <= set(METRICS)
    assert all(len(row["samples"]) >= 2 for row in rows if row["metric"] == "time_ms")
    assert all(row["value"] < 1e-3 for row in rows if row["metric"] == "error")
    assert all(row["value"] == 1 for row in rows if row["metric"] == "repeats")
    text = (out / "report.md").read_text()
    assert "3·T·H·W keys instead of 6·T·H·W | 72 instead of 144" in text
    assert "temporal, forward + backward" in text and "topology.png" in text
    assert (out / "topology.png").stat().st_size > 1000
    assert [path.name for path in out.parent.iterdir()] == ["first"]  # and nothing half-written beside it
    assert "topologies are made equal" in capsys.readouterr().out

    again = tmp_path / "again"
    assert command("--compare", "v2", "--scope", "attention", "--mode", "fwd", "--against", out, "--out", again) == 0
    assert f"Against {out}" in (again / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, device, expected",
    [
        ("", "cpu", {"upstream-half"}),
        ("", "cuda", {"documents", "documents-t4", "upstream"}),
        ("--quick", "cuda", {"tiny"}),
        ("--case documents tiny fine", "cpu", {"tiny"}),  # the documents' size on a CPU: where both are named
        ("--case documents tiny fine", "cuda", {"documents", "tiny"}),
        ("--case documents fine --scope step", "cpu", {"documents", "fine"}),
        ("--case documents --mode fwd", "cuda", set()),
        ("--mode step", "cpu", {"upstream-half"}),
    ],
)
def test_where_a_training_step_is_measured(arguments, device, expected, monkeypatch):
    monkeypatch.setattr(options, "_device", lambda name: torch.device(device))
    request = options.resolve(options.parse(run.__doc__, ["--compare", "v1", "v2", *arguments.split()]))
    assert {place.case for place in request.plan.places if place.scope == "step"} == expected
    others = set(request.plan.scopes) - {"step"}
    assert others == (set() if "step" in arguments else {"attention", "temporal"})


def test_a_training_step_that_no_experiment_has_is_told(tmp_path):
    out = tmp_path / "out"
    assert run.main(["--compare", "v2", "--case", "fine", "--scope", "step", "--device", "cpu", "--out", str(out)]) == 1
    assert "no training step at this size" in (out / "report.md").read_text()


def judged(monkeypatch, *verdicts, promised=True):
    found = [Judged("text", "figure", verdict, promised) for verdict in verdicts]
    monkeypatch.setattr(compare, "judge", lambda *arguments: found)


def test_what_is_only_expected_does_not_fail(tmp_path, monkeypatch):
    judged(monkeypatch, claims.FAILS, promised=False)
    arguments = ("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--check-claims")
    assert command(*arguments, "--out", tmp_path / "out") == 0


def test_an_operation_against_its_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(operation.shutil, "which", lambda name: None)
    assert command("--op", "trajectory_importance", "--mode", "fwd", "--out", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert {row["subject"] for row in rows} == {"trajectory_importance"}
    assert {row["provider"] for row in rows} == {"eager", "rigfuse"}
    assert "torch.compile needs a C++ compiler" in (tmp_path / "out" / "report.md").read_text()


def test_peers_can_be_left_out(tmp_path):
    arguments = ("--op", "cross_camera_attention", "--mode", "fwd", "--peers")
    for peers in ((), ("sdpa",)):
        out = tmp_path / f"{len(peers)}"
        assert command(*arguments, *peers, "--out", out) == 0
        assert {row["provider"] for row in rows_of(out)} == {"eager", "rigfuse", *peers}
        assert "Not measured" not in (out / "report.md").read_text()


def replace_toolkit_attention(monkeypatch, function):
    monkeypatch.setitem(implementations.IMPLEMENTATIONS["rigfuse"], "cross_camera_attention", function)


def test_a_wrong_result_gets_no_speed(tmp_path, monkeypatch, capsys):
    def off_by_one(query, key, value, table, *, key_mask):
        return kernels.cross_camera_attention(query, key, value, table[:, 1:], key_mask=key_mask)

    replace_toolkit_attention(monkeypatch, off_by_one)
    out = tmp_path / "out"
    assert command("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--out", out) == 1
    measured = {(row["provider"], row["metric"]) for row in rows_of(out)}
    assert ("v2", "error") in measured and ("v1", "time_ms") in measured
    assert not measured & {("v2", "time_ms"), ("v2", "peak_bytes")}
    assert "no speed reported" in (out / "report.md").read_text()
    assert "does not hold" in capsys.readouterr().out


def test_a_provider_that_cannot_run_says_why(tmp_path, monkeypatch):
    def out_of_memory(*arguments, **settings):
        raise torch.OutOfMemoryError("no memory left\nand more")

    replace_toolkit_attention(monkeypatch, out_of_memory)
    out = tmp_path / "out"
    assert command("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--out", out) == 0
    assert "| attention | tiny | v2 | no memory left |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "verdict, status", [(claims.HOLDS, 0), (claims.FAILS, 1), (claims.UNSURE, 1), (claims.ABSENT, 1)]
)
def test_check_claims_is_the_exit_status(tmp_path, monkeypatch, verdict, status):
    judged(monkeypatch, claims.HOLDS, verdict)
    arguments = ("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd")
    assert command(*arguments, "--check-claims", "--out", tmp_path / "checked") == status
    assert command(*arguments, "--out", tmp_path / "reported") == 0


def stop_when_timing(monkeypatch, mode, how):
    """Calls `how` in the second round of `mode`."""
    calls = []
    cpu_time = measure._cpu_time

    def timed(call, its_mode):
        calls.append(its_mode)
        if calls.count(mode) == 3:
            how()
        return cpu_time(call, its_mode)

    monkeypatch.setattr(measure, "_cpu_time", timed)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys, how):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    stop_when_timing(monkeypatch, "fwd-bwd", lambda: os.kill(os.getpid(), how))
    assert command("--compare", "v1", "v2", "--scope", "attention", "--out", out) == 130
    measured = {(row["provider"], row["mode"]) for row in rows_of(out) if row["metric"] == "time_ms"}
    assert measured == {("v1", "fwd"), ("v2", "fwd")}
    text = (out / "report.md").read_text()
    assert "**Partial**: interrupted at" in text and "attention · tiny · time, fwd-bwd" in text
    assert "| memory −50 %, stage 1, forward | — | not measured |" in text
    assert "Partial" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) is before


def test_a_row_is_on_the_disk_as_soon_as_it_is_measured(tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    stop_when_timing(monkeypatch, "fwd-bwd", lambda: seen.extend(rows_of(out)))
    assert command("--compare", "v1", "v2", "--scope", "attention", "--out", out) == 0
    timed = {(row["provider"], row["mode"]) for row in seen if row["metric"] == "time_ms"}
    assert timed == {("v1", "fwd"), ("v2", "fwd")}
    assert len(seen) < len(rows_of(out))


def test_an_interruption_before_the_first_row_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "measure_machine", interrupt)
    with pytest.raises(SystemExit) as ended:
        command("--compare", "v1", "--out", tmp_path / "runs" / "out")
    assert ended.value.code == 130 and list((tmp_path / "runs").iterdir()) == []
    assert capsys.readouterr().err == "run.py: interrupted\n"


def test_profile_writes_a_trace_with_the_ranges(tmp_path):
    out = tmp_path / "out"
    assert command("--compare", "v2", "--scope", "temporal", "--mode", "fwd", "--profile", "--out", out) == 0
    names = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"rigfuse::temporal/tiny/v2/fwd", "rigfuse::temporal_completion", "rigfuse::multi_depth_warp"} <= names


def test_nothing_is_left_behind_when_a_run_fails_before_the_first_row(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(subject, "measure_machine", fail)
    with pytest.raises(ZeroDivisionError):
        command("--compare", "v1", "--out", tmp_path / "runs" / "out")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("dirty, said", [(False, None), (True, "not to be committed"), (None, "Not to be committed")])
def test_results_say_whether_they_may_be_committed(dirty, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(facts, "_commit", lambda: ("0123456789ab", dirty))
    out = tmp_path / "out"
    assert command("--compare", "v1", "--scope", "attention", "--mode", "fwd", "--out", out) == 0
    assert {(row["commit"], row["dirty"]) for row in rows_of(out)} == {("0123456789ab", dirty)}
    for text in ((out / "report.md").read_text(), capsys.readouterr().out):
        assert "0123456789ab" in text and (said in text if said else "be committed" not in text)


def test_a_python_file_that_differs_from_the_commit_makes_results_dirty(tmp_path):
    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = facts._commit(tmp_path)
    assert len(commit) == 12 and dirty is False
    (tmp_path / "results.jsonl").write_text("{}")  # as the run before this one leaves it
    assert facts._commit(tmp_path) == (commit, False)
    (tmp_path / "new.py").touch()
    assert facts._commit(tmp_path) == (commit, True)
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("2")
    assert facts._commit(tmp_path) == (commit, True)


def test_the_commit_comes_from_the_environment_where_there_is_no_repository(monkeypatch):
    monkeypatch.setattr(facts, "_run", lambda *command, **options: None)
    monkeypatch.setenv("RIGFUSE_COMMIT", "fedcba987654")
    assert facts._commit() == ("fedcba987654", None)


def test_list_shows_everything_and_every_subject_is_found(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    shown = (*compare.PROVIDERS, *compare.SCOPES, *compare.CASES, *OPERATIONS, "frozen-checkpointed")
    assert all(name in text for name in shown)
    files = {path.stem for path in Path(compare.__file__).parent.glob("*.py")} - {"__init__"}
    assert {"compare", "detector", "op"} < set(SUBJECTS) and len(SUBJECTS) == len(files)


def test_every_operation_has_a_benchmark():
    public = {name for name in kernels.__all__ if name.islower()}
    assert set(OPERATIONS) == public


def refused(arguments, capsys):
    """What a mistaken command line is told: one line, status 2."""
    with pytest.raises(SystemExit) as ended:
        run.main(list(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("run.py: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--compare v1 v2x", "no provider 'v2x'; did you mean 'v2'?"),
        ("--compare v1 --case documets", "no case 'documets'; did you mean 'documents'?"),
        ("--compare v1 --scope temporl", "no scope 'temporl'; did you mean 'temporal'?"),
        ("--op multi_dept_warp", "no operation 'multi_dept_warp'; did you mean 'multi_depth_warp'?"),
        ("--op bev_warp --case static", "no case 'static'; did you mean 'static-bev'?"),
        ("--op bev_warp --peers compil", "no peer 'compil'; did you mean 'compile'?"),
        ("--comprae v1 v2", "unknown option --comprae; did you mean '--compare'?"),
        ("--compare v1 --mode bwd", "no mode 'bwd'; did you mean 'fwd'?"),
        ("--compare v1 --scope step --mode fwd", "--mode fwd: the scope step has the mode step and no other"),
        ("--op bev_warp --mode step", "--mode step: the scope step has the mode step and no other"),
        ("--compare v1 --device xyz", "no device 'xyz'; there are cpu, cuda"),
        ("--compare v1 --dtype half", "no dtype 'half'"),
        ("--compare v1 --data nowhere", "--data: nowhere is not a folder"),
        ("--compare v1 --against nowhere", "--against: nowhere holds no results.jsonl"),
        ("--compare v1 --out .", "--out .: exists already"),
        ("--compare v1 --check-claims", "--check-claims needs --compare v1 v2"),
        ("--op bev_warp --check-claims", "--check-claims needs --compare v1 v2"),
        ("--op bev_warp --scope temporal", "--scope goes with --compare, not with --op"),
        ("--compare v1 --peers", "--peers goes with --op, not with --compare"),
        ("--overhead --mode fwd", "--mode means nothing with --overhead"),
        ("--op bev_warp --data .", "--data means nothing with --op"),
        ("--compare v1 v2 --profile --check-claims", "--profile measures nothing"),
        ("--compare", "--compare: expected at least one argument"),
        ("", "choose one of --compare, --detector, --machine-code, "),
        ("--compare v1 --detector", "choose one of --compare, --detector"),
        ("--machine-code", "--machine-code needs triton's compiler: install triton, unset TRITON_INTERPRET"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert said in refused(arguments.split(), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def another_rig(*numbers):
    """A drive of a rig with some of nuScenes' cameras under other names."""
    drive = builtin_drives(scenes=1, length=4)[0]
    cameras = [replace(drive[0].rig.cameras[number], name=f"camera {number}") for number in numbers]
    return Drive("scene-1", 4, lambda index: replace(drive[index], rig=Rig(cameras)))


def test_any_rig_can_be_compared(tmp_path, monkeypatch):
    """Two cameras that see something in common, and one that looks back: its only neighbour is itself."""
    drives, out = [another_rig(0, 5, 1)], tmp_path / "out"
    monkeypatch.setattr(options, "open_drives", lambda root: drives)
    assert command("--compare", "v1", "v2", "--scope", "attention", "step", "--data", "ROOT", "--out", out) == 0
    text = (out / "report.md").read_text()
    assert "no training step with this rig" in text and "keys instead" not in text
    assert geometry.topology_of("neighbours", geometry.rig_of(drives)).attends == {
        "camera 0": ("camera 0", "camera 1"), "camera 5": ("camera 5",), "camera 1": ("camera 1", "camera 0")
    }  # fmt: skip
    case = compare.CASES["documents-two-missing"]
    assert case.missing_cameras(0, 3) == [0, 1] and case.missing_cameras(1, 6) == [1, 4]


def test_drives_that_do_not_fit_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    def no_lidar():
        raise ValueError("sample 1 of scene-1 has no LIDAR_TOP")

    other, two = another_rig(0, 1, 2), "a scene has the cameras camera 0, camera 1; needs camera 0, camera 1, camera 2"
    for subject_option, drives, said in (
        ("--compare v1", [other, another_rig(0, 1)], two),
        ("--compare v1", [Drive("scene-1", 4, lambda index: no_lidar())], "sample 1 of scene-1 has no LIDAR_TOP"),
        ("--compare v1", [], "ROOT has no scene"),
        (
            "--detector",
            [other],
            "a scene has the cameras camera 0, camera 1, camera 2; needs CAM_FRONT, CAM_FRONT_LEFT",
        ),
    ):
        monkeypatch.setattr(options, "open_drives", lambda root, drives=drives: drives)
        error = refused([*subject_option.split(), "--data", "ROOT", "--out", str(tmp_path / "out")], capsys)
        assert f"--data: {said}" in error and not (tmp_path / "out").exists()


DAMAGES = {
    "a text for a number": dict(value="fast"),
    "not a number": dict(value=float("nan")),
    "a negative time": dict(samples=[1.0, -2.0]),
    "no samples": dict(samples=[]),
    "text for samples": dict(samples="12"),
    "an unknown metric": dict(metric="time_s"),
    "a number for a name": dict(provider=3),
    "no hardware": dict(hardware=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_earlier_result_is_refused_before_anything_is_measured(damage, tmp_path, monkeypatch, capsys):
    row = dict(
        subject="compare", scope="attention", case="tiny", provider="v1", device="cpu", dtype="float32", mode="fwd",
        metric="time_ms", value=1.0, samples=[1.0], commit="x", hardware={}, versions={}, clocks={},
    )  # fmt: skip
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--compare", "v1", "v2", "--quick", "--against", str(tmp_path)]
    assert options.resolve(options.parse(run.__doc__, arguments)).earlier[0][0].value == 1.0
    (tmp_path / "results.jsonl").write_text(json.dumps(row | DAMAGES[damage]) + "\n")
    assert "--against: " in refused(arguments, capsys)
