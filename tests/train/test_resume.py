"""Going on: bit for bit where nothing changed, at the same place where a step's shape did, with what else changed."""

from dataclasses import fields
from itertools import count

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.checkpoint import CheckpointError
from rigfuse.train.config import OptimConfig, ScheduleConfig
from rigfuse.train.distributed import World
from rigfuse.train.main import resume_from
from rigfuse.train.trainer import Trainer
from support.runs import assert_same, figures, last, lines, train
from support.toy_experiment import ToyItems, toy

# Python 3.12 warns of the DataLoader's workers, which are forked while torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
EVERY = ("run.checkpoint_steps=1", "run.keep=50")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Options → the folder of a run with them that saved every fourth step, trained once for all tests."""
    folders = {}

    def train_once(*options):
        if options not in folders:
            folders[options] = tmp_path_factory.mktemp("before")
            train(folders[options], *options, "run.checkpoint_steps=4", "run.keep=50")
        return folders[options]

    return train_once


def at(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}.pt"


@pytest.mark.parametrize(
    "stop, options",
    [
        (5, ("run.amp=bfloat16",)),
        (12, ("run.amp=bfloat16",)),
        (5, ("loader.workers=2",)),
        (5, ("run.ema=0.9", "model.norm=true", "schedule.kind=cyclic", "optim.decay=matrices")),
        (7, ("optim.freeze_until={'head': 7, 'body': 9}", "model.norm=true")),
        (7, ("loader.batch_size=5", "schedule.kind=multistep", "run.accumulate=2", "run.epochs=5")),
    ],
    ids=["mid-epoch", "epoch's end", "2 workers", "average, norm, cyclic", "thawing", "left-over samples"],
)
def test_resume_is_bit_exact(tmp_path, stop, options):
    whole = train(tmp_path / "whole", *EVERY, *options)
    random_state = torch.get_rng_state()
    resumed = train(tmp_path / "part", *EVERY, *options, resume=at(tmp_path / "whole", stop))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(last(tmp_path / "part"), last(tmp_path / "whole"))
    assert resumed.total == whole.total == whole.progress.step
    assert figures(tmp_path / "part", stop) == figures(tmp_path / "whole", stop)


def test_a_run_begins_with_anothers_weights_where_they_fit(tmp_path):
    train(tmp_path / "first", "run.epochs=1")
    source = tmp_path / "first" / "checkpoints" / "last.pt"
    there = last(tmp_path / "first")["model"]
    trainer = Trainer(toy(), tmp_path / "second", World(), weights=source)
    assert_same(dict(trainer.model.state_dict()), dict(there))
    assert trainer.progress.step == 0 and trainer.begun == [
        f"began with {len(there)} of {len(there)} tensors from {source}"
    ]
    wider = Trainer(toy("model.width=9"), tmp_path / "third", World(), weights=source)
    took = [name for name, value in wider.model.state_dict().items() if value.shape == there[name].shape]
    assert 0 < len(took) < len(there) and all(torch.equal(wider.model.state_dict()[n], there[n]) for n in took)
    assert f"{len(took)} of {len(there)} tensors" in wider.begun[0] and "not found there: some of" in wider.begun[0]


# ---- the shape of a step, and the length of the run

LONG = ("run.epochs=4", "schedule.warmup_steps=16", "data.items=24")


def rates(folder, per_step):
    """Samples since `per_step` began to hold → learning rate, of every step."""
    return [(line["step"] * per_step, line["lr/base"]) for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("kind", ["cosine", "multistep", "cyclic"])
@pytest.mark.parametrize("stop", [4, 24, 28], ids=["in the warm-up", "epoch's end", "after it"])
@pytest.mark.parametrize("option, per_step", [("loader.batch_size=8", 8), ("run.accumulate=2", 4)])
def test_the_schedule_goes_on_by_samples(tmp_path, before, kind, stop, option, per_step):
    options = (*LONG, f"schedule.kind={kind}")
    whole = dict(rates(before(*options), 2))
    resumed = train(tmp_path, *options, option, resume=at(before(*options), stop))
    part = [(2 * stop + samples - stop * per_step, rate) for samples, rate in rates(tmp_path, per_step)]
    assert len(part) == resumed.total - stop == (96 - 2 * stop) / per_step and part[-1][0] == 96
    for samples, rate in part:
        assert rate == pytest.approx(whole[samples], abs=1e-12), samples


def test_an_epoch_goes_on_with_the_samples_it_has_left(tmp_path, monkeypatch, capsys):
    seen, read = [], ToyItems.__getitem__
    monkeypatch.setattr(ToyItems, "__getitem__", lambda self, key: (seen.append((len(self), *key)), read(self, key))[1])
    train(tmp_path / "whole", *EVERY)
    whole = [key for key in seen if key[0] == 24]
    seen.clear()
    capsys.readouterr()
    resumed = train(tmp_path / "part", "loader.batch_size=4", resume=at(tmp_path / "whole", 5))
    assert [key for key in seen if key[0] == 24] == whole[10:18] + whole[18:22] + whole[24:48]
    assert resumed.progress.step == 5 + 3 + 6 and resumed.progress.epoch == 2
    out = capsys.readouterr().out
    assert "at step 5: epoch 0 of 2, 10 of 24 samples; the schedule is at 20.8% of the run" in out
    assert "a step has 4 samples over all ranks, it had 2" in out


def test_a_finished_epoch_stays_finished_whatever_the_steps_are(tmp_path):
    train(tmp_path / "whole", "loader.batch_size=5", *EVERY)  # 20 of 24 samples
    resumed = train(tmp_path / "part", "loader.batch_size=2", resume=at(tmp_path / "whole", 4))
    assert resumed.progress.step == 4 + 12
    assert [line["epoch"] for line in lines(tmp_path / "part") if "val/error" in line] == [0, 1]


def test_more_epochs_stretch_the_schedule_and_fewer_are_refused(tmp_path, before):
    whole = before(*LONG, "schedule.kind=cosine")
    train(tmp_path / "double", *LONG, "run.epochs=8", resume=at(whole, 24))
    rate = {line["step"]: line["lr/base"] for line in lines(tmp_path / "double") if "loss" in line}
    done = lambda step: (step - 16) / (96 - 16)  # noqa: E731
    for step in (25, 60, 96):
        cosine = (1 + torch.tensor(torch.pi * done(step), dtype=torch.float64).cos().item()) / 2
        assert rate[step] == pytest.approx(0.02 * cosine, abs=1e-12)
    with pytest.raises(CheckpointError, match="is in epoch 2, counted from 0; run.epochs is 2, needs at least 3"):
        Trainer(toy(*LONG, "run.epochs=2"), tmp_path / "few", World(), resume=at(whole, 28))


def test_the_warm_up_takes_the_samples_it_was_given(tmp_path, before):
    options = ("schedule.warmup_steps=10", "schedule.kind=constant")
    whole = before(*options)
    train(tmp_path / "part", *options, "loader.batch_size=4", resume=at(whole, 4))
    rate = {line["step"]: line["lr/base"] for line in lines(tmp_path / "part") if "loss" in line}
    ramp = {samples: 0.02 * (0.1 + 0.9 * samples / 20) for samples in (12, 16, 20)}
    assert [rate[step] for step in (5, 6, 7)] == pytest.approx(list(ramp.values()))
    train(tmp_path / "short", *options, "schedule.warmup_steps=1", resume=at(whole, 4))
    assert next(line["lr/base"] for line in lines(tmp_path / "short")) == 0.02


def test_the_rate_follows_the_batch_where_it_is_told_to(tmp_path, capsys):
    def base(*options, **settings):
        folder = tmp_path / f"{next(numbers)}"
        train(folder, "schedule.kind=constant", "schedule.warmup_steps=0", *options, **settings)
        return folder, last(folder)["config"]["optim"]["lr"], lines(folder)[-2]["lr/base"]

    numbers = count()
    first, lr, rate = base()
    assert rate == lr == 0.02
    assert base("optim.base_batch=8", "run.accumulate=2")[2] == pytest.approx(0.02 * 4 / 8)
    assert "optim.lr 0.02 is for 8 samples a step, 0.01 for the 4 of this run" in capsys.readouterr().out
    assert base("optim.base_batch=8", "optim.batch_rule=sqrt")[2] == pytest.approx(0.02 / 2)
    assert base("optim.base_batch=2", "loader.batch_size=4", resume=at(first, 12))[2] == pytest.approx(0.04)


# ---- settings

# What a run is resumed with, besides the setting → the new value. Every setting of the two groups has its line.
CHANGES = {
    "optim.lr": ((), "0.01"),
    "optim.base_batch": ((), "8"),
    "optim.batch_rule": (("optim.base_batch=8",), "sqrt"),
    "optim.weight_decay": ((), "0.5"),
    "optim.decay": (("optim.weight_decay=0.5",), "matrices"),
    "optim.betas": ((), "0.5,0.9"),
    "optim.multipliers": ((), "{'head': 0.5}"),
    "optim.freeze": ((), "head"),
    "optim.freeze_until": ((), "{'head': 8}"),
    "optim.clip": ((), "0.01"),
    "schedule.kind": ((), "constant"),
    "schedule.warmup_steps": ((), "20"),
    "schedule.warmup_epochs": (("schedule.warmup_steps=20",), "0.5"),
    "schedule.warmup_factor": (("schedule.warmup_steps=20",), "0.5"),
    "schedule.final_factor": ((), "0.5"),
    "schedule.milestones": (("schedule.kind=multistep",), "0.3"),
    "schedule.gamma": (("schedule.kind=multistep",), "0.5"),
    "schedule.peak_factor": (("schedule.kind=cyclic",), "2"),
    "schedule.peak_at": (("schedule.kind=cyclic",), "0.6"),
    "schedule.momentum_factor": (("schedule.kind=cyclic",), "0.5"),
    "losses.main": ((), "0.5"),
    "losses.extra": ((), "3"),
    "model.dropout": ((), "0.5"),
    "model.width": ((), "9"),
    "run.seed": ((), "1"),
    "run.epochs": ((), "3"),
    "run.accumulate": ((), "2"),
    "run.amp": ((), "bfloat16"),
    "run.ema": ((), "0.5"),
    "loader.batch_size": ((), "4"),
    "data.items": ((), "20"),
}
REFUSED = {
    "optim.freeze": r"cannot be resumed: 2 parameters no longer train: head.bias, head.weight; changed: optim.freeze: ",
    "model.width": r"does not fit the model: it has body.0.weight as \(8, 4\).*; changed: model.width: 8 → 9",
    "run.seed": r"cannot be resumed in another order of the data; changed: run.seed: 0 → 1",
    "data.items": r"8 samples into an epoch of 24, the training set now has 20; resume at an epoch's end",
}


def test_every_setting_of_optimiser_and_schedule_has_its_line():
    known = {
        f"{name}.{f.name}"
        for name, kind in (("optim", OptimConfig), ("schedule", ScheduleConfig))
        for f in fields(kind)
    }
    assert known <= CHANGES.keys()


@pytest.mark.parametrize("setting", CHANGES)
def test_a_changed_setting_is_applied_or_refused(tmp_path, before, setting):
    base, value = CHANGES[setting]
    whole, options = before(*base), (*base, f"{setting}={value}")
    if setting in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[setting]) as error:
            Trainer(toy(*options), tmp_path / "part", World(), resume=at(whole, 4))
        assert "\n" not in str(error.value) and not (tmp_path / "part").exists()
        return
    resumed = train(tmp_path / "part", *options, resume=at(whole, 4))
    same, changed = (last(folder)["model"] for folder in (whole, tmp_path / "part"))
    assert any(not torch.equal(same[name], changed[name]) for name in same)
    assert any(line.startswith(f"  changed: {setting}") for line in resumed.begun)


def test_what_is_unfrozen_is_refused_too_and_an_epochs_end_takes_other_data(tmp_path, before):
    whole = before("optim.multipliers={'head': 0.0}")
    with pytest.raises(
        CheckpointError, match="2 parameters did not train: head.bias, .*changed: optim.multipliers.head"
    ):
        Trainer(toy("optim.multipliers={'head': 1.0}"), tmp_path / "x", World(), resume=at(whole, 4))
    resumed = train(tmp_path / "fewer", "data.items=20", resume=at(before(), 12))
    assert resumed.progress.step == 12 + 10


def test_other_groups_take_the_same_moments(tmp_path, before):
    """Another multiplier puts parameters into another group: each keeps what the optimiser remembers of it."""
    there = at(before(), 4)
    saved = checkpoint.load(there)["optimizer"]
    trainer = Trainer(toy("optim.multipliers={'bias': 0.5, 'extra': 2.0}"), tmp_path / "part", World(), resume=there)
    assert len(trainer.optimizer.param_groups) == 3
    for name, parameter in trainer.model.named_parameters():
        assert_same(dict(trainer.optimizer.state[parameter]), saved[name])


def test_another_measure_finds_another_best(before):
    assert checkpoint.load(at(before(), 16))["counters"]["best_step"] == 12
    resumed = Trainer(toy("metric=count"), before(), World(), resume=at(before(), 16))
    assert resumed.progress.best is None and any("looked for anew: count, min" in line for line in resumed.begun)


def test_a_checkpoint_of_another_version_is_said_to_be_one(tmp_path, before):
    state = last(before())
    for number, change in enumerate((lambda s: s.pop("data"), lambda s: s["counters"].update(batch=3))):
        other = dict(state, counters=dict(state["counters"]))
        change(other)
        path = checkpoint.save(tmp_path / f"{number}", 1, other, keep=1)
        with pytest.raises(CheckpointError, match="cannot be resumed, another version wrote it"):
            Trainer(toy(), tmp_path / "next", World(), resume=path)


# ---- branches


def test_auto_follows_the_branch_that_was_trained_last(tmp_path):
    def names():
        return [path.stem[-2:] for path in checkpoint.checkpoints(tmp_path / "checkpoints")]

    every = ("run.checkpoint_steps=3", "run.keep=3", "run.epochs=2")
    train(tmp_path, *every)
    assert names() == ["24", "21", "18"] or names() == ["24", "21", "18", "12"]
    with pytest.raises(SystemExit):  # one step later, and so before it saves anything of its own
        train(tmp_path, *every, "run.checkpoint_steps=100", "model.fault=sigterm@0:1", resume=at(tmp_path, 18))
    assert resume_from("auto", tmp_path) == at(tmp_path, 20).resolve()
    assert "24" not in names() and "21" not in names() and {"20", "18"} <= set(names())
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 21))
    train(tmp_path, *every, resume=resume_from("auto", tmp_path))
    assert names()[:3] == ["24", "21", "20"] and resume_from("auto", tmp_path) == at(tmp_path, 24).resolve()


def test_going_back_counts_from_the_start(tmp_path, monkeypatch):
    """A run that dies before it has saved anything leaves the place it went back to as the newest."""
    train(tmp_path, "run.checkpoint_steps=4", "run.keep=50")
    best = checkpoint.load(at(tmp_path, 20))["counters"]["best_step"]
    trainer = Trainer(toy(), tmp_path, World(), resume=at(tmp_path, 20))
    monkeypatch.setattr(trainer, "_train_epoch", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert resume_from("auto", tmp_path) == at(tmp_path, 20).resolve()
    assert (tmp_path / "checkpoints" / "best.pt").resolve() == at(tmp_path, best).resolve()
    assert at(tmp_path, 24).exists()


def test_another_folders_checkpoint_is_not_mixed_into_a_run(tmp_path):
    train(tmp_path / "a", "run.epochs=1")
    train(tmp_path / "b", "run.epochs=1")
    with pytest.raises(ValueError, match="b holds a run already"):
        resume_from(str(tmp_path / "a" / "checkpoints" / "last.pt"), tmp_path / "b")
    assert resume_from(str(at(tmp_path / "a", 12)), tmp_path / "new") == at(tmp_path / "a", 12)
    assert resume_from("auto", tmp_path / "new") is None


# ---- the moving average


def test_the_average_is_evaluated_saved_and_left_behind(tmp_path, before):
    trainer = train(tmp_path / "whole", "run.ema=0.9", "run.checkpoint_steps=5", "run.keep=9")
    state = last(tmp_path / "whole")
    learning, averages = state["average"]["weights"], state["model"]
    assert_same({name: p.detach() for name, p in trainer.model.named_parameters()}, learning)
    assert any(not torch.equal(averages[name], learning[name]) for name in learning)
    evaluated = toy().build_model()
    evaluated.load_state_dict(averages)
    validation = Trainer(toy(), tmp_path / "x", World())
    validation.model.load_state_dict(averages)
    assert validation.evaluate()["error"] == pytest.approx(lines(tmp_path / "whole")[-1]["val/error"], rel=1e-6)
    plain = train(tmp_path / "plain", resume=at(tmp_path / "whole", 5))
    assert any("run.ema is off" in line for line in plain.begun)
    assert_same(last(tmp_path / "plain")["model"], last(before())["model"])


def test_the_average_is_that_of_the_formula(tmp_path):
    train(tmp_path, "run.ema=0.8", "run.epochs=1", "model.norm=true", *EVERY)
    states = [checkpoint.load(at(tmp_path, step)) for step in range(1, 13)]
    assert [state["average"]["updates"] for state in states] == list(range(1, 13))
    average = states[0]["model"]["head.weight"]
    for t, state in enumerate(states[1:], start=2):
        decay = min(0.8, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * state["average"]["weights"]["head.weight"]
        torch.testing.assert_close(state["model"]["head.weight"], average)
    assert "norm.running_mean" in states[-1]["model"] and "norm.running_mean" not in states[-1]["average"]["weights"]
