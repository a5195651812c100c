"""What a run leaves and says: the log survives damage and full disks, and silence never lasts."""

import errno
import json
import os
import sys
import threading
import time

import pytest
import torch

from rigfuse.train import command_line, log
from rigfuse.train.command_line import patience
from rigfuse.train.files import write_whole
from rigfuse.train.log import RunLog, as_time, peak_memory, reset_peak_memory


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def reopened(folder, step):
    RunLog(folder, 100, step, tensorboard=False).close()
    return folder / "log.jsonl"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {step}, "loss": NaN}}\n' for step in (1, 2, 3, 4)))
    return tmp_path


def test_what_comes_after_the_resumed_step_is_dropped(folder):
    with open(folder / "log.jsonl", "a") as file:  # an evaluation comes after the checkpoint of its step
        file.write('{"step": 2, "val/error": 1.0}\n')
    assert steps(reopened(folder, 2)) == [1, 2]
    assert not (folder / "log.jsonl.damaged").exists()


@pytest.mark.parametrize("half", ['{"step": 5, "lo', '{"step": 5', "{}", "\0\0\0"])
def test_a_line_that_a_killed_run_left_half_is_dropped(folder, half, capsys):
    with open(folder / "log.jsonl", "a") as file:
        file.write(half)
    assert steps(reopened(folder, 9)) == [1, 2, 3, 4]
    assert capsys.readouterr().out == "" and not (folder / "log.jsonl.damaged").exists()


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x80", b"[1, 2]", b'{"step": "one"}', b'{"loss": 1.0}', b"\0" * 40, b"text"]
)
def test_a_damaged_log_is_kept_aside_and_said(folder, damage, capsys):
    path = folder / "log.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = lines[0] + damage + b"\n" + b"".join(lines[1:])
    path.write_bytes(damaged)
    assert steps(reopened(folder, 3)) == [1, 2, 3]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "1 lines of" in out and "log.jsonl.damaged" in out
    assert (folder / "log.jsonl.damaged").read_bytes() == damaged


def test_a_full_disk_does_not_cost_the_log(folder, monkeypatch):
    before = (folder / "log.jsonl").read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        reopened(folder, 2)
    with pytest.raises(OSError, match="No space left"):
        write_whole(folder / "log.jsonl", "other")
    assert (folder / "log.jsonl").read_bytes() == before and [path.name for path in folder.iterdir()] == ["log.jsonl"]


def test_without_a_terminal_half_a_minute_is_the_longest_silence(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    run = RunLog(tmp_path, 500, tensorboard=False)
    for step in range(1, 101):
        now[0] += 1
        run.advance(step)
        if step == 50:
            run.record(step, 0, {"val/error": 1.0})
    for batch in range(40):
        now[0] += 1
        run.evaluating(batch, 40)
    run.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in said] == [
        "step 30/500",
        "step 50/500",
        "step 80/500",
        "evaluating: 9/40 batches",
        "evaluating: 39/40 batches",
    ]
    assert "left 0:07:50" in said[0]


def test_work_that_cannot_be_counted_gives_signs_of_life_too(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "EVERY", 0.01)
    said = ""
    with patience("building"):
        while said.count("\n") < 2:  # whenever the thread comes to it
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert all(line.startswith("building … ") and line.endswith(" s") for line in said.splitlines())
    threads = threading.active_count()
    with patience("building", active=False):
        assert threading.active_count() <= threads


def test_hours_minutes_seconds():
    assert [as_time(seconds) for seconds in (0, 61.9, 3600 * 30 + 59)] == ["0:00:00", "0:01:01", "30:00:59"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux begins a new peak")
def test_what_an_earlier_run_held_does_not_count():
    cpu = torch.device("cpu")
    held = torch.ones(100 * 2**20)  # 400 MiB
    del held
    before = peak_memory(cpu)
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before - 300
    held = torch.ones(25 * 2**20)
    assert peak_memory(cpu) < before - 200 and held[0] == 1
