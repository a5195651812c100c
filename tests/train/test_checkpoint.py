"""Checkpoints: whole or absent, checked, and never code."""

import errno
import math
import multiprocessing
import os
import pickle
import signal

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.checkpoint import CheckpointError


def state(step, value=None):
    weight = torch.full((64, 64), float(value or step))
    return dict(model={"weight": weight}, counters=dict(step=step, best=None), config=dict(name="test"))


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    return tmp_path


def test_what_is_saved_comes_back(folder):
    loaded = checkpoint.load(folder / "last.pt")
    assert loaded["counters"] == dict(step=2, best=None)
    assert torch.equal(loaded["model"]["weight"], state(2)["model"]["weight"])


def test_the_digest_is_what_sha256sum_reads(folder):
    assert os.system(f"cd {folder} && sha256sum --check --status step-00000002.pt.sha256") == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step, keep", [(3, 1), (2, 3)])
def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint(folder, step, keep):
    """Killed before each change of the disk in turn, as many as there are; step 2 is there already."""
    checkpoint._prune(folder, folder / "step-00000002.pt", keep, None)
    before = {path.name for path in checkpoint.checkpoints(folder)}

    def save_and_die():
        calls = []

        def deadly(name):
            real = getattr(os, name)

            def call(*args, **kwargs):
                calls.append(None)
                if len(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, name, call)

        for name in ("fsync", "replace", "symlink", "unlink"):
            deadly(name)
        checkpoint.save(folder, step, state(step, value=9), keep)

    kills = 0
    for kill_at in range(1, 40):  # noqa: B007 (read in the child)
        child = multiprocessing.get_context("fork").Process(target=save_and_die)
        child.start()
        child.join(30)
        there = checkpoint.checkpoints(folder)
        assert checkpoint.load(checkpoint.newest(folder)) and checkpoint.load(folder / "last.pt")
        for path in there:
            checkpoint.load(path)  # whatever is there is whole
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert keep == 1 or before <= {path.name for path in there}
        kills += 1
    assert kills > 8
    assert checkpoint.load(folder / "last.pt")["model"]["weight"][0, 0] == 9
    assert os.system(f"cd {folder} && sha256sum --check --status step-*.sha256") == 0
    assert not list(folder.glob("*.writing"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("step", [3, 2])
def test_a_full_disk_costs_the_new_checkpoint_only(folder, call, step, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(folder, step, state(step, value=9), keep=1)
    names = [path.name for path in checkpoint.checkpoints(folder)]
    assert names == ["step-00000002.pt", "step-00000001.pt"]
    assert checkpoint.load(folder / "last.pt")["model"]["weight"][0, 0] == 2
    assert not list(folder.glob("*.writing"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_what_is_not_finite_is_never_written(folder, value, place):
    bad = state(3) | dict(optimizer=dict(weight=dict(exp_avg=torch.zeros(3))))
    target = bad["model"]["weight"][0] if place == "model" else bad["optimizer"]["weight"]["exp_avg"]
    target[1] = value
    with pytest.raises(CheckpointError, match=f"step 3 is not saved: {place}.weight.* not finite"):
        checkpoint.save(folder, 3, bad, keep=1)
    assert checkpoint.load(folder / "last.pt")["counters"]["step"] == 2
    assert len(checkpoint.checkpoints(folder)) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "digest"])
def test_damage_is_seen_and_another_one_named(folder, damage):
    path = folder / "step-00000002.pt"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1  # in the weights, where torch.load would not notice
    if damage == "digest":
        checkpoint._digest_path(path).write_bytes(b"\xff\x80 no digest\n\xfe")
    else:
        path.write_bytes({"flip": data, "truncate": data[:-100], "empty": b""}[damage])
    for name in ("step-00000002.pt", "last.pt"):
        with pytest.raises(CheckpointError, match="is damaged.*the newest good one is .*step-00000001.pt"):
            checkpoint.load(folder / name)


def test_a_flipped_byte_would_pass_without_the_digest(folder):
    """Why the digest is there."""
    path = folder / "step-00000002.pt"
    data = bytearray(path.read_bytes())
    place = data.find(torch.full((16,), 2.0).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], state(2)["model"]["weight"])


def test_the_damaged_digest_of_another_one_does_not_matter(folder):
    (folder / "step-00000002.pt.sha256").write_bytes(bytes(range(128, 256)))
    assert checkpoint.load(folder / "step-00000001.pt")["counters"]["step"] == 1
    (folder / "step-00000001.pt").unlink()
    with pytest.raises(CheckpointError, match="step-00000001.pt does not exist; there is no other"):
        checkpoint.load(folder / "step-00000001.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "it lacks model .*, counters .*, config"),
        (dict(weights={}), "it lacks model"),
        (dict(model=dict(w=1), counters=dict(step=1), config=dict(name="x")), "it lacks model"),
        (dict(model=dict(w=torch.ones(1)), counters=dict(), config=dict(name="x")), "it lacks counters"),
        (dict(model=dict(w=torch.ones(1)), counters=dict(step="1"), config=dict(name="x")), "it lacks counters"),
        (dict(model=dict(w=torch.ones(1)), counters=dict(step=1), config=dict()), "it lacks config"),
        (torch.ones(3), "it lacks model"),
        (b"PK\x03\x04 no archive", "not loaded"),
        (b'{"json": true}', "not loaded"),
        (b"", "not loaded"),
    ],
)
def test_a_good_digest_does_not_make_a_checkpoint(folder, content, message):
    path = folder / "step-00000009.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    checkpoint._digest_path(path).write_text(f"{checkpoint.digest(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match=f"{message}.*the newest good one is .*step-00000002.pt") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_malicious_pickle_runs_nothing(folder, write, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "step-00000009.pt"
    if write == "torch":
        torch.save(dict(model=Malicious()), path)
    else:
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    checkpoint._digest_path(path).write_text(f"{checkpoint.digest(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match="not loaded.*the newest good one is .*step-00000002.pt"):
        checkpoint.load(path)
    assert not (folder / "executed").exists()


def test_what_is_absent_is_said(folder):
    with pytest.raises(CheckpointError, match="step-00000007.pt does not exist; the newest good one is"):
        checkpoint.load(folder / "step-00000007.pt")
    (folder / "step-00000002.pt.sha256").unlink()
    with pytest.raises(CheckpointError, match="has no step-00000002.pt.sha256 beside it"):
        checkpoint.load(folder / "last.pt")


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        path = checkpoint.save(tmp_path, step, state(step), keep=2)
        if step == 1:
            checkpoint.link(path, "best")
    assert [path.name[-4] for path in checkpoint.checkpoints(tmp_path)] == ["5", "4", "1"]
    assert checkpoint.load(tmp_path / "best.pt")["counters"]["step"] == 1
    assert len(list(tmp_path.glob("*.sha256"))) == 3


def test_a_branch_drops_the_one_it_left_and_the_newest_is_of_the_branch(tmp_path):
    for step in (5, 10, 15, 20):
        path = checkpoint.save(tmp_path, step, state(step), keep=9)
        if step in (5, 15):
            checkpoint.link(path, "best")
    checkpoint.go_back(tmp_path, 10, best_step=5)
    assert checkpoint.newest(tmp_path).name == "step-00000010.pt"
    assert os.readlink(tmp_path / "best.pt") == "step-00000005.pt"
    assert len(checkpoint.checkpoints(tmp_path)) == 4  # until something of the new branch is there
    checkpoint.save(tmp_path, 13, state(13), keep=2, branched_at=10)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step-{s:08d}.pt" for s in (13, 10, 5)]
    assert checkpoint.newest(tmp_path).name == "step-00000013.pt"
    (tmp_path / "last.pt").unlink()
    (tmp_path / "step-notes.pt").write_text("the user's")
    assert checkpoint.newest(tmp_path).name == "step-00000013.pt"
    checkpoint.save(tmp_path, 100_000_000, state(14), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-100000000.pt" and (tmp_path / "step-notes.pt").exists()
