"""A run's folder: one training at a time, and clear words where there can be none."""

import errno
import os
import subprocess
import sys

import pytest

from rigfuse.train.lock import claimed

HOLD = """
import sys
from rigfuse.train.lock import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_turned_away_until_the_first_is_gone(tmp_path, holder):
    folder = tmp_path / "run"
    (folder / "config.json").write_text("the first one's")
    with pytest.raises(
        BlockingIOError, match=f"run is in use by another training .process {holder.pid} on .*--work-dir"
    ):
        with claimed(folder):
            pass
    assert (folder / "config.json").read_text() == "the first one's"
    holder.kill()
    holder.wait()
    with claimed(folder):  # what a killed process held is free
        pass
    assert (folder / "config.json").exists()


def test_what_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c").is_dir()
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "mine").is_dir() and (tmp_path / "a" / "b" / "result").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(NotADirectoryError, match="run.*: a folder is needed, and there is a file"), claimed(folder):
            pass
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_cannot_be_written_to_is_said(tmp_path, monkeypatch, number):
    def refuse(path, *arguments, **settings):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"run cannot be written to: {os.strerror(number)}") as error:
        with claimed(tmp_path / "run"):
            pass
    assert "\n" not in str(error.value)
