"""The experiments by name, and `train/main.py` from the command line to the figures."""

import json

import pytest
import torch

from rigfuse.train import main as program
from rigfuse.train.config import diff, dumps, to_dict, update
from rigfuse.train.systems import EXPERIMENTS, experiment

QUICK = ("data.scenes=1,1", "run.epochs=1", "data.image_size=32,64", "run.tensorboard=false", "run.log_steps=4")


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
    capsys.readouterr()

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
        (["--config", "completion_v3"], "error: no config 'completion_v3'; did you mean 'completion_v2'?"),
        (["--config", "completion_v2_tiny", "--cfg-options", "run.epoch=1"], "did you mean 'run.epochs'?"),
        (["--config", "completion_v2_tiny", "--data", "/nowhere"], "error: /nowhere is not a folder"),
        (["--config", "completion_v2_tiny", "--resume", "nothing.pt"], "error: nothing.pt does not exist"),
        (["--config", "completion_v2_tiny", "--cfg-options", "optim.freeze=backbon"], "did you mean 'backbone'?"),
        (["--eval-only", "nothing.pt"], "error: nothing.pt does not exist"),
        (["--diff-config", "completion_v1", "completion"], "did you mean 'completion_"),
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
