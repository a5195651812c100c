"""System C's experiments: what they say, what they freeze, and a tiny one from the command line to the figures."""

import json

import pytest
import torch
from torch import nn

from rigfuse.modules.maps_layout import MapLayout
from rigfuse.train import checkpoint
from rigfuse.train import main as program
from rigfuse.train.config import diff, to_dict
from rigfuse.train.optim import learning_rate, parameter_groups, set_training
from rigfuse.train.systems import experiment
from rigfuse.train.systems.cmt_aqr.configs import EXPERIMENTS

SIZE = "voxel0100_r50_800x320_cbgs"
FULL = f"cmt_aqr_{SIZE}"
TINY = f"{FULL}_tiny"
FROZEN = ("img_backbone", "pts_backbone", "pts_voxel_encoder", "pts_middle_encoder")
NAMES = [name for name in EXPERIMENTS if "_tiny" not in name]


@pytest.fixture(scope="module")
def full():
    """Every experiment with its network and its groups of parameters, without their memory."""
    made = {name: experiment(name) for name in NAMES}
    with torch.device("meta"):
        models = {name: settings.build_model() for name, settings in made.items()}
    return {name: (made[name], models[name], parameter_groups(models[name], made[name].optim)) for name in NAMES}


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_every_pattern_of_the_documents_matches(full):
    settings, model, groups = full[FULL]
    rates = {group["name"]: group["lr"] / settings.optim.lr for group in groups}
    assert rates == pytest.approx(
        dict(img_neck=0.05, pts_neck=0.05, transformer=0.5, query_embed=0.5, shared_conv=0.5, reference_points=0.3)
        | {"task_heads": 0.8, "aqr_weight_generator": 1.0, "attention_bias_generator.bias_scale": 0.5}
    )
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == set(FROZEN)


def test_training_is_as_upstreams(full):
    settings, _, groups = full[FULL]
    assert settings.schedule.kind == "cyclic" and settings.schedule.peak_factor == 6.0
    assert {parameter.ndim > 1 for group in groups if group["weight_decay"] for parameter in group["params"]} == {True}
    assert {parameter.ndim > 1 for group in groups if not group["weight_decay"] for parameter in group["params"]} == {
        False
    }
    assert learning_rate(settings.optim, 32) == pytest.approx(2 * learning_rate(settings.optim, 16)) == 2.8e-4


def test_three_quarters_are_frozen(full):
    """Of 41 million; the documents say 50 million frozen, with larger backbones."""
    for name, (_, model, groups) in full.items():
        trained, everything = sum(count(group["params"]) for group in groups), count(model.parameters())
        share = 1 - trained / everything
        assert share == 0 if "unfrozen" in name else share == pytest.approx(0.74, abs=0.02)
        assert everything == pytest.approx(41.0e6, rel=0.03)


def test_the_maps_are_those_of_the_documents(full):
    model = full[FULL][1]
    maps = model.attention_bias_generator.maps
    assert [tuple(m) for m in maps] == [(128, 128, 5)] + [(20, 50, 8)] * 6
    assert model.reference_points.shape == (900, 3) and len(model.transformer.layers) == 6
    assert model.layout == MapLayout()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cmt_aqr_scale20", ["model.aqr.bias_scale: 2.5 → 2.0"]),
        ("cmt_aqr_scale30", ["model.aqr.bias_scale: 2.5 → 3.0"]),
        ("cmt_aqr_fixed", ["model.aqr.learnable_scale: true → false"]),
        ("cmt_aqr_v1", ['model.aqr.generation: "v3" → "v1"', "model.aqr.learnable_scale: true → false"]),
        ("cmt_aqr_v2", ['model.aqr.generation: "v3" → "v2"', "model.aqr.learnable_scale: true → false"]),
        ("cmt", ['model.aqr.generation: "v3" → "none"', "model.aqr.learnable_scale: true → false"]),
    ],
)
def test_ablations_differ_in_what_they_say(name, expected):
    lines = diff(*(to_dict(experiment(each)) for each in (FULL, f"{name}_{SIZE}")))
    assert [line for line in lines if not line.startswith(("name:", "optim.multipliers."))] == expected


@pytest.mark.parametrize("name", [f"{name}_tiny" for name in NAMES])
def test_every_tiny_one_builds_what_it_says(name):
    settings = experiment(name)
    model = settings.build_model()
    parameter_groups(model, settings.optim)
    aqr = settings.model.aqr
    assert model.generation == aqr.generation and (model.aqr_weight_generator is None) == (aqr.generation == "none")
    if aqr.generation == "v3":
        assert isinstance(model.attention_bias_generator.bias_scale, nn.Parameter) == aqr.learnable_scale


def test_a_tiny_one_is_fine_tuned_as_the_documents_do():
    settings = experiment(f"{TINY}_frozen")
    model = settings.build_model()
    groups = parameter_groups(model, settings.optim)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(FROZEN) and {group["name"] for group in groups} >= {"aqr_weight_generator", "task_heads"}


def test_what_is_frozen_stays_in_evaluation():
    block = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    partly = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict(dict(frozen=block, partly=partly, dropout=nn.Dropout()))
    model["frozen"].requires_grad_(False)
    partly[0].requires_grad_(False)
    set_training(model)
    modes = {name for name, module in model.named_modules() if module.training}
    assert modes == {"", "partly", "partly.1", "dropout"}
    before = block[1].running_mean.clone()
    block(torch.randn(8, 2))
    assert torch.equal(block[1].running_mean, before)


def test_train_freeze_and_evaluate_from_the_command_line(small_world, tmp_path, capsys):
    folder = tmp_path / "run"
    freeze = [f"optim.multipliers.{name}=0" for name in FROZEN]
    quick = ["run.epochs=2", "run.log_steps=1", "run.checkpoint_steps=1", "run.keep=50", "run.tensorboard=false"]
    arguments = ["--data", str(small_world), "--work-dir", str(folder), "--cfg-options", *freeze, *quick]
    with pytest.raises(SystemExit, match="frozen, and as random as they were made: img_backbone, .* random_frozen="):
        program.main(["--config", TINY, *arguments])
    assert not folder.exists() or not list(folder.glob("checkpoints/*"))
    arguments.append(f"random_frozen={','.join(FROZEN)}")
    program.main(["--config", TINY, *arguments, "loader.batch_size=1", "run.evaluate_epochs=2"])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained, evaluated = [line for line in records if "loss" in line], records[-1]
    assert all(line["aqr/bias_scale"] == pytest.approx(2.5, abs=0.1) for line in trained)
    assert trained[-1]["aqr/weight_camera"] > 0 and evaluated["val/aqr/weight_lidar"] > 0
    assert 0 <= evaluated["val/NDS"] <= 1 and "val/AP/car" in evaluated

    first, *_, last = (checkpoint.load(path)["model"] for path in checkpoint.checkpoints(folder / "checkpoints")[::-1])
    moved = {name for name, value in last.items() if not torch.equal(value, first[name])}
    assert not any(name.startswith(FROZEN) for name in moved)
    assert {"shared_conv.1.running_mean", "img_neck.lateral.0.weight", "reference_points"} <= moved
    capsys.readouterr()

    program.main(["--eval-only", str(folder / "checkpoints" / "last.pt")])
    figures = json.loads(capsys.readouterr().out)
    assert {f"val/{name}": value for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in evaluated.items() if name.startswith("val/")}, abs=1e-6
    )


def test_a_world_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="data.root is empty, detection needs a folder in nuScenes format"):
        program.main(["--config", TINY, "--work-dir", str(tmp_path / "run")])
