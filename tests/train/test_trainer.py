"""The training loop in one process: exact resume, signals, non-finite steps, determinism, logs."""

import math

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.distributed import World
from rigfuse.train.trainer import Trainer, TrainingError
from support.runs import assert_same, last, lines, train
from support.toy_experiment import toy

# Python 3.12 warns of the DataLoader's workers, which are forked while torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.parametrize("fault, workers", [("sigterm", 0), ("sigterm-group", 2)])
def test_sigterm_saves_once_and_the_resumed_run_ends_the_same(tmp_path, fault, workers):
    train(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", f"model.fault={fault}@0:4", f"loader.workers={workers}")
    assert stopped.value.code == 143
    found = checkpoint.checkpoints(tmp_path / "stopped" / "checkpoints")
    assert [path.name for path in found] == ["step-00000005.pt"]
    train(tmp_path / "stopped", resume=found[0])
    for part in ("model", "optimizer", "counters"):
        assert_same(last(tmp_path / "stopped")[part], last(tmp_path / "whole")[part], part)
    steps = [line["step"] for line in lines(tmp_path / "stopped") if "loss" in line]
    assert steps == list(range(1, 25))


def test_a_nan_never_reaches_the_weights_and_too_many_stop(tmp_path):
    with pytest.raises(TrainingError, match=r"4 steps in a row .*max_skipped is 3"):
        train(tmp_path, "model.fault=nan@0:6", "run.max_skipped=3", "run.checkpoint_steps=1", "run.keep=50")
    folder = tmp_path / "checkpoints"
    good, skipped = (checkpoint.load(folder / f"step-{step:08d}.pt") for step in (6, 9))
    assert_same(skipped["model"], good["model"])
    assert_same(skipped["optimizer"], good["optimizer"])
    assert skipped["counters"]["skipped"] == 3
    assert all(value.isfinite().all() for value in skipped["model"].values())


def test_single_skips_are_counted_and_training_goes_on(tmp_path, monkeypatch):
    trainer = Trainer(toy(), tmp_path, World())
    forward, calls = trainer.model.forward, []

    def sometimes_infinite(batch):
        calls.append(None)
        output = forward(batch)
        output.losses["main"] = output.losses["main"] * (math.inf if len(calls) in (3, 4, 9) else 1)
        return output

    monkeypatch.setattr(trainer.model, "forward", sometimes_infinite)
    trainer.fit()
    assert (trainer.progress.skipped, trainer.progress.skipped_in_a_row, trainer.progress.step) == (3, 0, 24)
    assert trainer.schedule.last_epoch == 21


@pytest.mark.parametrize("nan", [False, True])
def test_a_nan_metric_is_never_the_best(tmp_path, nan):
    train(tmp_path, f"metric_is_nan={str(nan).lower()}")
    assert (tmp_path / "checkpoints" / "best.pt").exists() != nan


def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path, monkeypatch):
    trainer = Trainer(toy("run.epochs=5", "run.keep=2", "data.items=4"), tmp_path, World())
    errors = iter([3.0, 1.0, float("nan"), 2.0, 4.0])
    monkeypatch.setattr(trainer.experiment, "evaluate", lambda model, loader: dict(error=next(errors)))
    trainer.fit()
    names = {path.name for path in (tmp_path / "checkpoints").glob("*.pt")}
    assert names == {"step-00000004.pt", "step-00000008.pt", "step-00000010.pt", "best.pt", "last.pt"}
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["counters"]["step"] == 4


def test_deterministic_means_bitwise(tmp_path):
    options = ("run.deterministic=true", "run.epochs=1")
    runs = [train(tmp_path / name, *options, f"run.seed={seed}") for name, seed in dict(a=0, b=0, c=1).items()]
    first, second, other = (run.state_dict() for run in runs)
    assert_same(first, second)
    assert not torch.equal(first["model"]["head.weight"], other["model"]["head.weight"])
    torch.use_deterministic_algorithms(False)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    # Whether the loss `extra` is there depends on the batch, so leave it out.
    steps = ("model.dropout=0", "losses.extra=0", "run.epochs=1")
    large = train(tmp_path / "large", *steps, "loader.batch_size=4")
    small = train(tmp_path / "small", *steps, "loader.batch_size=2", "run.accumulate=2")
    assert small.progress.step == large.progress.step == 6
    norms = [[line["grad_norm"] for line in lines(tmp_path / name) if "loss" in line] for name in ("small", "large")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # Adam itself would not mind a factor
    for name, weight in large.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(name), weight, rtol=1e-4, atol=1e-6)


def test_float16_keeps_its_scale(tmp_path):
    trainer = train(tmp_path, "run.amp=float16", "model.fault=nan@0:22")
    state = last(tmp_path)
    scale = 65536 / 2**trainer.progress.skipped  # halved by every skipped step
    assert trainer.progress.skipped >= 2 and state["scaler"]["scale"] == scale
    resumed = Trainer(toy("run.amp=float16"), tmp_path, World(), resume=tmp_path / "checkpoints/last.pt")
    assert resumed.scaler.get_scale() == scale


def test_it_learns_and_logs_each_loss(tmp_path):
    train(tmp_path, "run.epochs=10", "run.tensorboard=true")
    records = [line for line in lines(tmp_path) if "loss" in line]
    assert records[-1]["losses/main"] < 0.1 * records[0]["losses/main"]
    expected = {"losses/main", "losses/extra", "lr/base", "grad_norm", "speed/it_per_s", "memory/peak_mib"}
    assert expected <= {name for record in records for name in record}
    weighted = [record["losses/main"] + 0.1 * record.get("losses/extra", 0) for record in records]
    assert [record["loss"] for record in records] == pytest.approx(weighted)
    assert [line["val/count"] for line in lines(tmp_path) if "val/error" in line] == [5] * 10
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_bad_files_are_named_and_bounded(tmp_path, capsys):
    train(tmp_path / "few", "data.bad=3,7", "loader.max_bad_files=2")
    assert "skipped image-3.jpg" in capsys.readouterr().out
    assert lines(tmp_path / "few")[-2]["bad_files"] == 2
    with pytest.raises(TrainingError, match=r"more than 2 files are missing or broken .*image-"):
        train(tmp_path / "many", "data.bad=3,7,8", "loader.max_bad_files=2")


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 24 items, one step needs 32 \(batch\) × 1 \(accumulate\) × 1"):
        Trainer(toy("loader.batch_size=32"), tmp_path, World())
    unweighted = toy()
    del unweighted.losses["extra"]
    with pytest.raises(ValueError, match="the loss 'extra' has no weight; set losses.extra"):
        Trainer(unweighted, tmp_path, World()).fit()
    with pytest.raises(ValueError, match="metric is 'errors', the evaluation gives error, count"):
        train(tmp_path, "metric=errors", "run.epochs=1")
    train(tmp_path / "other", "run.epochs=1")
    there = tmp_path / "other" / "checkpoints" / "last.pt"
    with pytest.raises(CheckpointError, match=r"does not fit the model: it has body.0.weight as \(8, 4\), needs"):
        Trainer(toy("model.width=6"), tmp_path, World(), resume=there)
