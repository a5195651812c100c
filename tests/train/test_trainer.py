"""The training loop in one process: what it computes, signals, skipped steps, determinism, logs."""

import json
import math

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.distributed import World
from rigfuse.train.order import hash_seed
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
    break_forward(trainer, monkeypatch, (3, 4, 9), lambda loss: loss * math.inf)
    trainer.fit()
    progress = trainer.progress
    assert (progress.skipped, progress.skipped_in_a_row, progress.step, progress.skipped_samples) == (3, 0, 24, 6)
    assert progress.place(trainer.batches, 2)[0] == 21


def break_forward(trainer, monkeypatch, when, damage):
    """`damage` changes the loss of these calls of the network, after everything else in them has happened."""
    forward, calls = trainer.model.forward, []

    def broken(batch):
        calls.append(None)
        output = forward(batch)
        if len(calls) in when:
            output.losses["main"] = damage(output.losses["main"])
        return output

    monkeypatch.setattr(trainer.model, "forward", broken)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("cause", ["loss", "gradient", "buffer"])
def test_a_skipped_step_leaves_no_trace(tmp_path, monkeypatch, cause):
    """The second of a step's two batches is the one that breaks; the first has moved the statistics by then."""
    options = ["model.norm=true", "run.accumulate=2", "run.ema=0.9", "schedule.kind=cyclic", "run.checkpoint_steps=1"]
    options += ["run.keep=50", "run.epochs=1"]
    trainer = Trainer(toy(*options), tmp_path, World())
    if cause == "buffer":
        huge = list(trainer.batches)[2 * 3 + 1][0][1]
        trainer = Trainer(toy(*options, f"data.huge={huge}"), tmp_path, World())
    else:
        damage = dict(loss=lambda loss: loss * math.nan, gradient=InfiniteGradient.apply)[cause]
        break_forward(trainer, monkeypatch, (8,), damage)
    trainer.fit()
    before, after, next_one = (checkpoint.load(tmp_path / "checkpoints" / f"step-{n:08d}.pt") for n in (3, 4, 5))
    for part in ("model", "average", "optimizer"):
        assert_same(after[part], before[part], part)
    assert not torch.equal(next_one["model"]["norm.running_mean"], before["model"]["norm.running_mean"])
    rate = {line["step"]: line["lr/base"] for line in lines(tmp_path) if "loss" in line}
    assert rate[4] == rate[3] != rate[5]
    assert trainer.progress.skipped == 1 and after["counters"]["skipped_samples"] == 4
    assert all(value.isfinite().all() for value in last(tmp_path)["model"].values())


def test_an_infinite_statistic_stops_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(TrainingError, match="3 steps in a row had a loss, gradient or buffer that is not finite"):
        everything = "data.huge=" + ",".join(map(str, range(24)))
        train(tmp_path, "model.norm=true", "run.max_skipped=2", everything, "run.checkpoint_steps=1")
    assert all(value.isfinite().all() for value in last(tmp_path)["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    trainer = Trainer(toy("run.checkpoint_steps=6"), tmp_path, World())
    forward = trainer.model.forward

    def poisoned(batch):
        output = forward(batch)
        if trainer.progress.step == 11:
            torch.nn.init.constant_(trainer.model.extra.bias, math.nan)
        return output

    monkeypatch.setattr(trainer.model, "forward", poisoned)
    with pytest.raises(
        checkpoint.CheckpointError, match="step 12 is not saved: model.extra.bias has values that are not"
    ):
        trainer.fit()
    assert last(tmp_path)["counters"]["step"] == 6


def test_the_trainer_computes_what_this_loop_does(tmp_path):
    """AdamW, clipping, accumulation, the schedule, the order and the random state, written out."""
    settings = toy("optim.weight_decay=0.3", "optim.betas=0.7,0.9", "optim.clip=0.5", "run.accumulate=2")
    settings.model.dropout, settings.optim.multipliers, settings.run.seed = 0.5, {"head": 0.5}, 3
    torch.manual_seed(3)
    model = settings.build_model()
    data, moments, norms = settings.build_data()[0], {}, []
    for step in range(12):
        torch.manual_seed(hash_seed(3, 0, step))
        epoch, place = divmod(step, 6)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(hash_seed(3, epoch))).tolist()
        for first in (4 * place, 4 * place + 2):
            output = model(settings.collate([data[epoch, index] for index in order[first : first + 2]]))
            total = output.losses["main"] + 0.1 * output.losses.get("extra", 0) + 0 * model.extra(torch.zeros(8)).sum()
            (total / 2).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        norms.append(norm.item())
        warm = 0.1 + 0.9 * step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        for name, p in model.named_parameters():
            lr = 0.02 * warm * (0.5 if name.startswith("head") else 1)
            gradient = p.grad * min(1, 0.5 / norm)
            m, v = moments.get(name, (0, 0))
            m, v = moments[name] = 0.7 * m + 0.3 * gradient, 0.9 * v + 0.1 * gradient**2
            denominator = (v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
            p.data = p.data * (1 - lr * 0.3) - lr * m / (1 - 0.7 ** (step + 1)) / denominator
            p.grad = None
    trainer = Trainer(settings, tmp_path, World())
    trainer.fit()
    assert [line["grad_norm"] for line in lines(tmp_path) if "loss" in line] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1  # so that clipping matters
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name).data, p.data, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("nan", [False, True])
def test_a_nan_metric_is_never_the_best(tmp_path, nan):
    train(tmp_path, f"metric_is_nan={str(nan).lower()}")
    assert (tmp_path / "checkpoints" / "best.pt").exists() != nan
    text = (tmp_path / "result.json").read_text()
    assert (json.loads(text)["figures"]["error"] is None) == nan and "NaN" not in text


@pytest.mark.parametrize("mode, best", [("min", 4), ("max", 8)])
def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path, monkeypatch, mode, best):
    options = ("run.epochs=5", "run.keep=2", "data.items=4", f"metric_mode={mode}")
    trainer = Trainer(toy(*options), tmp_path, World())
    errors = iter([3.0, 1.0, float("nan"), 4.0, 2.0])
    monkeypatch.setattr(trainer.experiment, "evaluate", lambda model, loader: dict(error=next(errors)))
    trainer.fit()
    names = {path.name for path in (tmp_path / "checkpoints").glob("*.pt")}
    assert names == {f"step-{step:08d}.pt" for step in (best, 8, 10)} | {"best.pt", "last.pt"}
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["counters"]["step"] == best
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"] == dict(metric="error", value=dict(min=1.0, max=4.0)[mode], step=best)


@pytest.mark.parametrize("amp", ["float32", "bfloat16", "float16"])
def test_amp_is_what_the_network_computes_in(tmp_path, amp):
    trainer, seen = Trainer(toy(f"run.amp={amp}", "run.epochs=1"), tmp_path, World()), []
    trainer.model.head.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, output.dtype))
    )
    trainer.fit()
    assert set(seen) == {(True, getattr(torch, amp)), (False, getattr(torch, amp))}


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_said_to_torch(tmp_path, deterministic):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        Trainer(toy(f"run.deterministic={str(deterministic).lower()}"), tmp_path, World())
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


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
    with pytest.raises(TrainingError, match="the loss 'extra' has no weight; the experiment's losses are main"):
        Trainer(unweighted, tmp_path, World()).fit()
    with pytest.raises(ValueError, match="metric is 'errors'; did you mean 'error'?"):
        train(tmp_path, "metric=errors")
    unnamed = toy("metric=errors", "run.epochs=1")
    unnamed.figure_names = tuple
    with pytest.raises(TrainingError, match="metric is 'errors', the evaluation gives error, count"):
        Trainer(unnamed, tmp_path, World()).fit()
    in_code = toy()
    in_code.run.accumulate = -2
    in_code.build_data = None  # nothing is built
    with pytest.raises(ValueError, match="run.accumulate is -2, needs at least 1"):
        Trainer(in_code, tmp_path, World())


def test_a_run_ends_with_a_result(tmp_path, capsys):
    trainer = Trainer(toy("run.epochs=1"), tmp_path, World())
    figures = trainer.fit()
    result = json.loads((tmp_path / "result.json").read_text())
    best = dict(metric="error", value=figures["error"], step=12)
    counts = dict(steps=12, epochs=1, skipped=0, bad_files=0)
    assert result.pop("machine")["torch"] == torch.__version__
    assert result == dict(name="toy", **counts, best=best, figures=figures)
    end = capsys.readouterr().out.splitlines()[-4:]
    assert end[0].startswith("finished after 12 steps") and end[3].startswith(
        f"best error {figures['error']:.5g} at step"
    )
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "toy"
