"""Checkpoints: whole or absent, checked, and never code."""

import multiprocessing
import os
import pickle
import signal

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.checkpoint import CheckpointError


def state(step, value=None):
    return dict(model={"weight": torch.full((64, 64), float(value or step))}, counters=dict(step=step, best=None))


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
@pytest.mark.parametrize("moment", ["fsync", "replace", "symlink"])
@pytest.mark.parametrize("step", [3, 2], ids=["new", "again"])
def test_a_kill_during_the_save_leaves_the_previous_one(folder, moment, step):
    def save_and_die():
        real, calls = getattr(os, moment), []

        def deadly(*args, **kwargs):
            calls.append(None)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, moment, deadly)
        checkpoint.save(folder, step, state(step, value=9), keep=3)

    for kill_at in (1, 2, 3):
        child = multiprocessing.get_context("fork").Process(target=save_and_die)
        child.start()
        child.join(30)
        assert child.exitcode in (0, -signal.SIGKILL) and (kill_at > 1 or child.exitcode != 0)
        assert checkpoint.load(folder / "step-00000001.pt")["counters"]["step"] == 1
        for path in checkpoint.checkpoints(folder):
            checkpoint.load(path)  # whatever is there is whole
    checkpoint.save(folder, step, state(step), keep=3)
    assert checkpoint.load(folder / "last.pt")["counters"]["step"] == step
    assert not list(folder.glob("*.writing"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_seen_and_another_one_named(folder, damage):
    path = folder / "step-00000002.pt"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1  # in the weights, where torch.load would not notice
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
    checkpoint._digest_path(path).write_text(f"{checkpoint._sha256(path)}  {path.name}\n")
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
