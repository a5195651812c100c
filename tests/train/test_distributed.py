"""Two gloo ranks: they agree, they resume, and when one fails all stop."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.distributed import World
from rigfuse.train.trainer import Trainer
from support import toy_experiment
from support.ranks import run_ranks, train_toy_on_ranks
from support.runs import lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    options = ("model.dropout=0", "losses.extra=0", "run.checkpoint_steps=4", "run.keep=50")
    Trainer(toy_experiment.toy(*options), path / "single", World()).fit()
    run_ranks(toy_experiment.train_on_ranks, 2, path)
    return path


def states(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def equal(a, b):
    weights = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    return weights and a["counters"] == b["counters"]


def test_both_ranks_hold_the_same_weights(folder):
    for name in ("whole", "from-one", "dropout", "nan", "thaw"):
        assert equal(*states(folder, name)), name


def test_two_ranks_are_one_with_twice_the_batch(folder, tmp_path):
    single = Trainer(toy_experiment.toy("model.dropout=0", "losses.extra=0", "loader.batch_size=4"), tmp_path, World())
    single.fit()
    state = states(folder, "whole")[0]
    assert state["counters"]["step"] == single.progress.step == 12
    assert state["data"] == dict(items=24, per_step=4)
    for name, weight in single.model.named_parameters():
        torch.testing.assert_close(state["model"][name], weight.detach(), rtol=1e-4, atol=1e-6)


def test_a_run_that_one_rank_began_goes_on_at_its_place(folder, tmp_path):
    there = folder / "single" / "checkpoints" / "step-00000004.pt"
    options = ("model.dropout=0", "losses.extra=0", "loader.batch_size=4")
    single = Trainer(toy_experiment.toy(*options), tmp_path, World(), resume=there)
    single.fit()
    state = states(folder, "from-one")[0]
    same = ("epoch", "step", "samples", "warmup_samples", "best_step")
    assert all(state["counters"][name] == vars(single.progress)[name] for name in same)
    assert single.progress.step == 4 + 4 + 6
    for name, weight in single.model.named_parameters():
        torch.testing.assert_close(state["model"][name], weight.detach(), rtol=1e-4, atol=1e-6)
    rates = [
        {line["step"]: line["lr/base"] for line in lines(run) if "loss" in line}
        for run in (folder / "from-one", tmp_path, folder / "single")
    ]
    assert rates[0] == rates[1] and rates[0][5] == pytest.approx(rates[2][6]) and rates[0][14] == 0


def test_every_rank_and_every_step_has_random_numbers_of_its_own(folder):
    seeds = [states(folder, "dropout")[rank]["seeds"] for rank in range(2)]
    assert len(seeds[0]) == len(seeds[1]) == 12 and len({*seeds[0], *seeds[1]}) == 24


@pytest.mark.parametrize("name", ["", "dropout-"])
def test_resume_is_bit_exact_on_every_rank(folder, name):
    whole = states(folder, "dropout" if name else "whole")
    for rank, resumed in enumerate(states(folder, f"{name}resumed")):
        assert equal(resumed, whole[rank])


def test_a_nan_on_one_rank_is_skipped_by_both(folder):
    first, second = states(folder, "nan")
    assert first["counters"]["skipped"] == second["counters"]["skipped"] == 2  # the last two of six steps
    assert first["counters"]["skipped_samples"] == 2 * 8
    assert all(value.isfinite().all() for value in first["model"].values())


def test_an_infinite_statistic_on_one_rank_is_put_back_on_both(folder):
    """The first rank's buffers are what is saved, and it saw nothing; the other's would be in its next gradients."""
    for state in states(folder, "huge"):
        assert state["counters"]["skipped"] == 1
        assert all(value.isfinite().all() for value in state["model"].values())
        assert state["model"]["norm.num_batches_tracked"] == 5


def test_the_others_wait_for_the_first_rank_and_fail_with_it(folder):
    first, second = (json.loads((folder / "first" / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert first == dict(acted=True, error="OSError: the disk is full", saved=True)
    assert second == dict(acted=True, error="FirstRankError: the disk is full", saved=True)


def test_an_evaluation_counts_every_ranks_share(folder):
    """Of a real experiment: two ranks report, both, what one reports alone."""
    toy_experiment.evaluate_on_rank(World(), folder)
    alone, first, second = (json.loads((folder / f"figures-{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert first == second and first == pytest.approx(alone, rel=1e-5)
    assert all(math.isfinite(value) for value in alone.values()) and len(alone) > 3


def test_every_rank_evaluates_its_share_once(folder):
    assert [line["val/count"] for line in lines(folder / "whole") if "val/count" in line] == [5, 5]


def test_what_is_evaluated_on_ranks_is_what_is_saved(folder, tmp_path):
    """Each rank's batch norms saw its own batches; the checkpoint has the first rank's, and so does the evaluation."""
    saved = checkpoint.load(folder / "huge" / "checkpoints" / "last.pt")
    alone = Trainer(toy_experiment.toy("model.norm=true"), tmp_path, World())
    checkpoint.load_weights(alone.model, saved["model"], "the run's")
    logged = [line["val/error"] for line in lines(folder / "huge") if "val/error" in line]
    assert logged == [pytest.approx(alone.evaluate()["error"], rel=1e-5)]


# ---- a frozen model, whole on each rank or split over both by FSDP2


def test_both_ranks_hold_the_same_weights_and_figures_of_maps(folder):
    for name in ("whole", "sharded", "resumed"):
        first, second = states(folder / "maps", name)
        assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items()), name
        assert first["figures"] == second["figures"] and "mAP" in first["figures"]


def test_a_sharded_model_gives_the_gradients_of_a_whole_one(folder):
    """So after two steps the weights are the same; each rank holds about half of the frozen ones."""
    whole, sharded = states(folder / "maps", "whole")[0], states(folder / "maps", "sharded")[0]
    assert whole["local"] == whole["total"] and 0 < sharded["local"] < 0.6 * sharded["total"]
    assert whole["model"].keys() == sharded["model"].keys()
    for name, value in whole["model"].items():
        torch.testing.assert_close(sharded["model"][name], value, rtol=1e-5, atol=1e-6)


def test_a_sharded_run_resumes_bit_for_bit(folder):
    whole, resumed = states(folder / "maps", "sharded")[0], states(folder / "maps", "resumed")[0]
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


# ---- processes that torchrun watches over


def torchrun(folder, *options):
    """(status, output, seconds) of the toy on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", toy_experiment.__file__, str(folder), *options]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=90
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_an_error_on_one_rank_stops_all_within_a_minute(tmp_path):
    status, output, seconds = torchrun(tmp_path, "model.fault=raise@1:4", "run.checkpoint_steps=2")
    assert status != 0 and seconds < 60
    assert "the toy broke on purpose" in output
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["counters"]["step"] == 4


def test_an_error_in_the_save_stops_all_within_a_minute(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    every = ("--config", "toy", "--work-dir", str(tmp_path / "run"), "--cfg-options", "run.checkpoint_steps=2")
    (first, said), (second, other) = train_toy_on_ranks(2, tmp_path / "logs", *every)  # within a minute, or it raises
    assert first == second == 1 and "error: [Errno 17] File exists" in said.splitlines()[-1]
    assert "Traceback" not in said + other


def test_sigterm_to_torchrun_saves_once(tmp_path):
    options = ("model.fault=sigterm-parent@1:4", "run.epochs=2000", "loader.workers=1")
    status, output, seconds = torchrun(tmp_path, *options)
    assert status != 0 and seconds < 60, output
    (stopped,) = re.findall(r"stopped by SIGTERM at step (\d+)", output)  # one line of one rank
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert saved["counters"]["step"] == int(stopped) >= 5
    assert checkpoint.newest(tmp_path / "checkpoints") == checkpoint.path_of(tmp_path / "checkpoints", int(stopped))
