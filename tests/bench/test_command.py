"""The command from end to end on a tiny case, and what it says to mistakes."""

import json

import pytest
import torch

from rigfuse.bench import options, run
from rigfuse.bench.eager import eager_attention
from rigfuse.bench.results import METRICS
from rigfuse.bench.subjects import compare
from rigfuse.bench.subjects.operations import operation


@pytest.fixture(autouse=True)
def little_effort(monkeypatch):
    monkeypatch.setattr(options, "QUICK", dict(seconds=0.0, least_rounds=2))


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
    request = options.resolve(options.parse(["--compare", "v1", "v2", *arguments.split()]))
    assert {case for scope, case in request.places if scope == "step"} == expected
    others = {scope for scope, _ in request.places} - {"step"}
    assert others == (set() if "step" in arguments else {"attention", "temporal"})


def test_a_training_step_that_no_experiment_has_is_told(tmp_path):
    out = tmp_path / "out"
    assert run.main(["--compare", "v2", "--case", "fine", "--scope", "step", "--device", "cpu", "--out", str(out)]) == 1
    assert "no training step at this size" in (out / "report.md").read_text()


def test_what_is_only_expected_does_not_fail(tmp_path, monkeypatch):
    expected = run.claims.Claim("text", "figure", False, expected=True)
    monkeypatch.setattr(run.claims, "judge", lambda *arguments: [expected])
    arguments = ("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--check-claims")
    assert command(*arguments, "--out", tmp_path / "out") == 0


def test_an_operation_against_its_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(operation.shutil, "which", lambda name: None)
    assert command("--op", "trajectory_importance", "--mode", "fwd", "--out", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert {row["subject"] for row in rows} == {"trajectory_importance"}
    assert {row["provider"] for row in rows} == {"eager", "rigfuse"}
    assert "torch.compile needs a C++ compiler" in (tmp_path / "out" / "report.md").read_text()


def test_a_wrong_result_gets_no_speed(tmp_path, monkeypatch, capsys):
    def off_by_one(query, key, value, table, key_mask):
        return eager_attention(query, key, value, table[:, 1:], key_mask)

    monkeypatch.setattr(compare, "_fused_attention", off_by_one)
    out = tmp_path / "out"
    assert command("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--out", out) == 1
    measured = {(row["provider"], row["metric"]) for row in rows_of(out)}
    assert ("v2", "error") in measured and ("v1", "time_ms") in measured
    assert not measured & {("v2", "time_ms"), ("v2", "peak_bytes")}
    assert "no speed reported" in (out / "report.md").read_text()
    assert "does not hold" in capsys.readouterr().out


def test_a_provider_that_cannot_run_says_why(tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("no memory left\nand more")

    monkeypatch.setattr(compare, "_fused_attention", out_of_memory)
    out = tmp_path / "out"
    assert command("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd", "--out", out) == 0
    assert "| attention | tiny | v2 | no memory left |" in (out / "report.md").read_text()


@pytest.mark.parametrize("holds, status", [(True, 0), (False, 1), (None, 1)])
def test_check_claims_is_the_exit_status(tmp_path, monkeypatch, holds, status):
    monkeypatch.setattr(run.claims, "judge", lambda *arguments: [run.claims.Claim("text", "figure", holds)])
    arguments = ("--compare", "v1", "v2", "--scope", "attention", "--mode", "fwd")
    assert command(*arguments, "--check-claims", "--out", tmp_path / "checked") == status
    assert command(*arguments, "--out", tmp_path / "reported") == 0


def test_profile_writes_a_trace_with_the_ranges(tmp_path):
    out = tmp_path / "out"
    assert command("--compare", "v2", "--scope", "temporal", "--mode", "fwd", "--profile", "--out", out) == 0
    names = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"rigfuse::temporal/tiny/v2/fwd", "rigfuse::temporal_completion", "rigfuse::multi_depth_warp"} <= names


def test_nothing_is_left_behind_when_a_run_fails(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "measure", fail)
    with pytest.raises(ZeroDivisionError):
        command("--compare", "v1", "--out", tmp_path / "runs" / "out")
    assert list((tmp_path / "runs").iterdir()) == []


def test_list_shows_everything(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*compare.PROVIDERS, *compare.SCOPES, *options.CASES, *options.OPERATIONS))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--compare v1 v2x", "no provider 'v2x', did you mean v2? choose from v1, v2, v1-fused, v2-eager"),
        ("--compare v1 --case documets", "no case 'documets', did you mean documents?"),
        ("--compare v1 --scope temporl", "no scope 'temporl', did you mean temporal?"),
        ("--op multi_dept_warp", "no operation 'multi_dept_warp', did you mean multi_depth_warp?"),
        ("--op bev_warp --case static", "no case 'static', did you mean static-bev?"),
        ("--comprae v1 v2", "no option '--comprae', did you mean --compare?"),
        ("--compare v1 --mode bwd", "no mode 'bwd', did you mean fwd?"),
        ("--compare v1 --scope step --mode fwd", "--mode fwd: the scope step has the mode step and no other"),
        ("--op bev_warp --mode step", "--mode step: the scope step has the mode step and no other"),
        ("--compare v1 --device xyz", "no device 'xyz'; choose from cpu, cuda"),
        ("--compare v1 --dtype half", "no dtype 'half'"),
        ("--compare v1 --data nowhere", "--data: nowhere is not a folder"),
        ("--compare v1 --against nowhere", "--against: nowhere holds no results.jsonl"),
        ("--compare v1 --out .", "--out .: exists already"),
        ("--compare v1 --check-claims", "--check-claims needs --compare v1 v2"),
        ("--op bev_warp --scope temporal", "--scope goes with --compare, not with --op"),
        ("--compare v1 v2 --profile --check-claims", "--profile measures nothing"),
        ("--compare", "--compare: expected at least one argument"),
        ("", "choose one of --compare PROVIDER …, --op NAME, --list"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert run.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
