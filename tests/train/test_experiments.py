"""The experiments by name, and `train/main.py` from the command line to the figures."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from rigfuse.train import main as program
from rigfuse.train.config import diff, dumps, to_dict, update
from rigfuse.train.lock import claimed
from rigfuse.train.systems import EXPERIMENTS, experiment
from support.toy_experiment import toy

QUICK = ("data.scenes=1,1", "run.epochs=1", "data.image_size=32,64", "run.tensorboard=false", "run.log_steps=4")
QUICK += ("evaluate_without=CAM_FRONT,CAM_BACK_LEFT",)


def run(*arguments):
    program.main([*arguments])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_survives_json(name):
    made = experiment(name)
    assert made.name == name and update(experiment(name), json.loads(dumps(made))) == made


COMPLETION = [name for name in EXPERIMENTS if name.startswith("completion") and name.endswith("_tiny")]


@pytest.mark.parametrize("name", COMPLETION)
def test_every_tiny_one_builds_what_it_says(name):
    made = experiment(name)
    model = made.build_model()
    stages = (made.model.temporal.enable, made.model.vae.enable, made.model.planning.enable)
    assert stages == tuple(stage is not None for stage in (model.temporal, model.vae, model.planning))
    assert model.backbone.strides == made.model.backbone.strides
    if model.temporal is not None:
        assert model.temporal.history.length == made.data.history


def test_v1_and_v2_differ_in_topology_alone():
    settings = [to_dict(experiment(name)) for name in ("completion_v1", "completion_v2")]
    lines = [line for line in diff(*settings) if not line.startswith("name:")]
    assert lines == ['model.temporal.topology: "global" → "neighbours"']
    weights = [experiment(f"completion_{version}_tiny").build_model().state_dict() for version in ("v1", "v2")]
    assert {k: v.shape for k, v in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}


def test_train_resume_and_evaluate_from_the_command_line(tmp_path, capsys):
    folder = tmp_path / "run"
    run("--config", "completion_v2_tiny", "--work-dir", str(folder), "--deterministic", "--cfg-options", *QUICK)
    torch.use_deterministic_algorithms(False)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = [line for line in records if "loss" in line]
    assert trained[-1]["losses/ssl"] < 0.7 * trained[0]["losses/ssl"]
    assert records[-1]["val/relative_l2"] < 0.9 * records[-1]["val/relative_l2_none"]
    assert json.loads((folder / "config.json").read_text())["run"]["deterministic"] is True
    said = capsys.readouterr().out.splitlines()
    assert sum("RANDOM FEATURES: the weights of the ResNet and the FPN are random and frozen" in x for x in said) == 1

    run("--eval-only", str(folder / "checkpoints" / "best.pt"))
    torch.use_deterministic_algorithms(False)
    figures = json.loads(capsys.readouterr().out)
    assert figures["relative_l2"] == pytest.approx(records[-1]["val/relative_l2"], rel=1e-6)

    with pytest.raises(SystemExit, match="holds a run already; --resume auto continues it"):
        run("--config", "completion_v2_tiny", "--work-dir", str(folder))
    longer = [*QUICK, "run.epochs=2", "run.max_skipped=7"]
    run("--config", "completion_v2_tiny", "--work-dir", str(folder), "--resume", "--cfg-options", *longer)
    out = capsys.readouterr().out
    assert "resumed from" in out and "changed: run.max_skipped: 20 → 7" in out
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 2 * trained[-1]["step"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "completion_v4"], "error: no config 'completion_v4'; did you mean 'completion_v"),
        (["--config", "completion_v2_tiny", "--cfg-options", "run.epoch=1"], "did you mean 'run.epochs'?"),
        (["--config", "completion_v2_tiny", "--data", "/nowhere"], "error: /nowhere is not a folder"),
        (["--config", "completion_v2_tiny", "--resume", "nothing.pt"], "error: nothing.pt does not exist"),
        (["--config", "completion_v2_tiny", "--cfg-options", "optim.freeze=backbon"], "did you mean 'backbone'?"),
        (["--eval-only", "nothing.pt"], "error: nothing.pt does not exist"),
        (["--diff-config", "completion_v1", "completion"], "did you mean 'completion_"),
        *(
            (["--config", "completion_v2_tiny", "--cfg-options", option], f"error: {message}")
            for option, message in {
                "run.accumulate=-2": "run.accumulate is -2, needs at least 1",
                "optim.clip=-1": "optim.clip is -1.0, needs at least 0",
                "optim.lr=1e999": "optim.lr is inf, needs a finite number",
                "loader.batch_size=0": "loader.batch_size is 0, needs at least 1",
                "run.evaluate_epochs=0": "run.evaluate_epochs is 0, needs at least 1",
                "run.log_steps=0": "run.log_steps is 0, needs at least 1",
                "losses.sssl=1": "no setting 'losses.sssl'; did you mean 'losses.ssl'?",
                "schedule.milestones=0.9,0.5": "schedule.milestones are (0.9, 0.5), need to rise",
            }.items()
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--configs", "completion_v2"], "unknown option --configs; did you mean '--config'?"),
        ([], "needs --config NAME"),
        (["--eval-only", "a.pt", "--resume"], "choose one"),
        (["--config", "x", "--work-dirs", "y"], "did you mean '--work-dir'?"),
    ],
)
def test_mistyped_options_are_told_too(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_settings_can_be_looked_at(capsys):
    run("--config", "completion_v1_tiny", "--print-config", "--data", "/data/nuscenes", "--cfg-options", "losses.ssl=3")
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["root"] == "/data/nuscenes" and shown["losses"]["ssl"] == 3
    run("--diff-config", "completion_v2", "completion_v2_kv8")
    assert "model.temporal.kv_downsample: 4 → 8" in capsys.readouterr().out
    run("--list")
    assert capsys.readouterr().out.split() == list(EXPERIMENTS)
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--cfg-options", "torchrun", "result.json", "completion_v2_tiny"))


# ---- the folder of a run


@pytest.fixture
def run_toy(tmp_path, monkeypatch):
    """The program with the toy: exit code or message, None where it ended well."""
    monkeypatch.setattr(program, "experiment", lambda name: toy())

    def run_it(*options, resume=()):
        try:
            run("--config", "toy", "--work-dir", str(tmp_path / "run"), *resume, "--cfg-options", *options)
        except SystemExit as stopped:
            return stopped.code

    return run_it


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_trainings_do_not_share_a_folder(tmp_path, run_toy):
    assert run_toy("run.epochs=1") is None
    before = everything(tmp_path)
    with claimed(tmp_path / "run"):
        before = everything(tmp_path)
        for resume in ((), ("--resume", "auto")):
            told = run_toy("run.epochs=2", resume=resume)
            assert "run is in use by another training" in told and "\n" not in told
    assert everything(tmp_path) == before


def test_a_file_where_the_folder_should_be(tmp_path, run_toy):
    (tmp_path / "run").write_text("mine")
    assert run_toy("run.epochs=1").endswith("run: a folder is needed, and there is a file")
    assert everything(tmp_path) == {Path("run"): b"mine"}


@pytest.mark.parametrize("name", ["checkpoints", "log.jsonl", "config.json"])
def test_something_else_in_the_place_of_a_file_is_one_line(tmp_path, run_toy, name):
    place = tmp_path / "run" / name
    place.parent.mkdir()
    place.write_text("not a folder") if name == "checkpoints" else place.mkdir()
    told = run_toy("run.epochs=1")
    assert told.startswith("error: ") and name in told and "\n" not in told


@pytest.mark.parametrize("file", ["step-", "log.jsonl", "result.json"])
def test_a_disk_that_fills_up_is_one_line_and_costs_nothing_written(tmp_path, run_toy, monkeypatch, file):
    assert run_toy("run.epochs=1") is None
    before, replace = everything(tmp_path), os.replace

    def full(source, target):
        if Path(target).name.startswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        told = run_toy("run.epochs=2", resume=("--resume",))
    assert "No space left on device" in told and "\n" not in told
    after = everything(tmp_path)
    kept = [path for path in before if path.name.startswith("step-")]
    assert all(after[path] == before[path] for path in kept) and not list(tmp_path.rglob("*.writing"))
    assert run_toy("run.epochs=2", resume=("--resume",)) is None
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(24) == 2 and set(steps) == set(range(1, 25))


def test_a_damaged_log_does_not_stop_a_run(tmp_path, run_toy, capsys):
    assert run_toy("run.epochs=1") is None
    path = tmp_path / "run" / "log.jsonl"
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert run_toy("run.epochs=2", resume=("--resume",)) is None
    assert "1 lines of" in capsys.readouterr().out


def test_an_averaged_run_is_evaluated_with_its_averages(tmp_path, run_toy, capsys):
    assert run_toy("run.epochs=1", "run.ema=0.9") is None
    expected = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    capsys.readouterr()
    run("--eval-only", str(tmp_path / "run" / "checkpoints" / "last.pt"))
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected, rel=1e-6)
