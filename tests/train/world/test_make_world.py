"""The command: what it refuses, says, counts, and how it ends when it is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from rigfuse.train.tools import make_world as make_world_module
from rigfuse.train.tools.make_world import Meter, main, parse, settings_of
from rigfuse.train.world import WorldSettings, describe, make_world
from rigfuse.train.world.summary import summarise


def test_the_command_explains_itself_and_refuses_in_one_line(world, capsys, tmp_path):
    def refused(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        message = capsys.readouterr().err
        assert code == 2 and message.count("\n") == 1, message
        return message

    assert "did you mean '--scenes'" in refused("--out", tmp_path / "a", "--scnes", 3)
    assert "not an empty folder" in refused("--out", world, "--scenes", 1)
    assert "--out" in refused("--scenes", 3)
    assert "--seed" in refused("--over", world, "--out", tmp_path / "a", "--seed", 3)
    assert "multiple of 16" in refused("--out", tmp_path / "a", "--width", 333)
    assert "is not a nuScenes root" in refused("--over", tmp_path, "--out", tmp_path / "a")
    assert "give one of them" in refused("--out", tmp_path / "a", "--samples", 3, "--seconds", 3)
    assert "seconds is -1.0" in refused("--out", tmp_path / "a", "--seconds", -1)
    assert "streets, parking" in refused("--out", tmp_path / "a", "--town", "village")
    assert "can last 120 s" in refused("--out", tmp_path / "a", "--seconds", 121)
    assert "choose from world-0000" in refused("--over", world, "--out", tmp_path / "a", "--only", "scene-x")
    assert main(["--check", str(world)]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--over ROOT --out FOLDER" in capsys.readouterr().out


def test_seconds_and_period_make_samples():
    def samples(*arguments):
        return settings_of(parse(["--out", "a", *arguments])).samples

    assert samples() == WorldSettings.samples and samples("--samples", "7") == 7
    assert samples("--seconds", "20") == 41 and samples("--seconds", "20", "--period", "0.1") == 201
    assert samples("--seconds", "0.3", "--period", "0.1") == 4  # although 0.3 / 0.1 is a little less than 3


def test_a_summary_counts_what_is_there(world, rows, settings, capsys):
    summary = json.loads((world / "summary.json").read_text())
    assert summary["settings"] == asdict(settings)
    assert summary["scenes"] == len(rows("scene")) and summary["samples"] == len(rows("sample"))
    assert sum(summary["boxes"].values()) == len(rows("sample_annotation"))
    assert summary["towns"] == sorted(row["town"] for row in rows("log"))
    assert summary["splits"] == {"world_train": 1, "world_val": 1, "world_all": 2}
    lanes = [json.loads(path.read_text())["lane"] for path in (world / "maps" / "expansion").iterdir()]
    assert summary["map_elements"]["lane"] == sum(map(len, lanes))
    text = describe(summary)
    for word in ("2 scenes", "1 world_val", "vehicle.car", "lane_divider", "speed_bumps", "WideDashedLine"):
        assert word in text


def test_futures_are_counted_by_the_time_that_follows(rows, world):
    """With a limit of half a second, every box that has a next one counts."""
    figures = summarise(world, "v1.0-mini", future=0.5)
    assert figures["boxes_with_future"] == sum(bool(row["next"]) for row in rows("sample_annotation")) > 0


def test_progress_is_a_line_now_and_then_where_nobody_watches(capsys, monkeypatch):
    now = iter([0.0, 0.0, *np.arange(1, 100, 7.0)])
    monkeypatch.setattr("rigfuse.train.tools.make_world.time.monotonic", lambda: next(now))
    meter = Meter("samples")
    for done in range(1, 11):
        meter(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["6 of 10 samples, about 24 s left", "10 of 10 samples, about 0 s left"]


def children(pid):
    """Process ids of the children of a process."""
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True).stdout
    return [int(number) for number in listed.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_children_and_no_folder(number, tmp_path):
    script = str(Path(make_world_module.__file__))
    command = [sys.executable, script, "--out", "made", "--scenes", "2", "--samples", "40", "--width", "640"]
    running = subprocess.Popen(
        [*command, "--workers", "2"], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 300
    while not list(tmp_path.glob(".made.*/samples/*/*")):  # drawing has begun
        assert running.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    workers = children(running.pid)
    assert len(workers) >= 2
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)  # Ctrl-C reaches the whole group
    message = running.communicate(timeout=120)[1]
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < limit
        time.sleep(0.1)
    if number != signal.SIGKILL:
        assert running.returncode == 128 + number
        assert message.splitlines() == ["make_world: stopped; made is not written"]
        assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_worker_ends_them_all_and_leaves_nothing(tmp_path):
    def stop(done, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        make_world(tmp_path / "out", WorldSettings(scenes=1, samples=1, width=64), workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == [] and not active_children()
