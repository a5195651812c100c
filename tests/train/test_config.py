"""Settings: typed overrides, JSON, differences, and the experiments by name."""

import json
from dataclasses import dataclass, field

import pytest

from rigfuse.train.config import (
    Experiment,
    OptimConfig,
    ScheduleConfig,
    apply_options,
    diff,
    dumps,
    flatten,
    to_dict,
    update,
)


@dataclass
class Sizes:
    weights: str | None = None
    strides: tuple[int, ...] = (8, 16)
    names: tuple[str, ...] = ()


@dataclass
class Example(Experiment):
    model: Sizes = field(default_factory=Sizes)
    optim: OptimConfig = field(default_factory=OptimConfig)


@pytest.mark.parametrize(
    "option, key, value",
    [
        ("run.epochs=3", "run.epochs", 3),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=2e-4", "optim.lr", 2e-4),
        ("run.deterministic=True", "run.deterministic", True),
        ("model.weights=/a=b", "model.weights", "/a=b"),
        ("model.weights=none", "model.weights", None),
        ("model.strides=4,8,16", "model.strides", (4, 8, 16)),
        ("model.strides=[4]", "model.strides", (4,)),
        ("model.names=CAM_FRONT,CAM_BACK", "model.names", ("CAM_FRONT", "CAM_BACK")),
        ("optim.betas=(0.9, 0.95)", "optim.betas", (0.9, 0.95)),
        ("schedule.kind=multistep", "schedule.kind", "multistep"),
        ("losses.ssl=2", "losses", {"ssl": 2.0}),
        ("optim.multipliers.neck.bias_scale=0.5", "optim.multipliers", {"neck.bias_scale": 0.5}),
        ("optim.multipliers={'neck': 0.05}", "optim.multipliers", {"neck": 0.05}),
    ],
)
def test_options_take_the_type_of_their_field(option, key, value):
    config = apply_options(Example(), [option])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    "option, message",
    [
        ("run.epoch=3", "no setting 'run.epoch'; did you mean 'run.epochs'?"),
        ("model.stride=3", "did you mean 'model.strides'?"),
        ("run=3", "no setting 'run'"),
        ("run.epochs.x=3", "no setting 'run.epochs.x'"),
        ("run.epochs=2.5", "run.epochs is 2.5, needs int"),
        ("run.epochs=many", "run.epochs is 'many', needs int"),
        ("run.epochs=true", "run.epochs is 'true', needs int"),
        ("run.deterministic=1", "run.deterministic is '1', needs bool"),
        ("optim.betas=0.9", r"optim.betas is \[0.9\], needs tuple\[float, float\]"),
        ("model.strides=4,b", "model.strides is '"),
        ("run.amp=bfloat", "run.amp is 'bfloat'; did you mean 'bfloat16'?"),
        ("run.epochs", "has no '='; write key=value"),
    ],
)
def test_a_wrong_option_is_one_line_that_helps(option, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        apply_options(Example(), [option])
    assert "\n" not in str(error.value)


def test_json_and_back():
    config = apply_options(Example(), ["model.strides=4", "optim.multipliers.a.b=0.5", "schedule.kind=multistep"])
    again = update(Example(), json.loads(dumps(config)))
    assert again == config and isinstance(again.schedule, ScheduleConfig)
    with pytest.raises(ValueError, match="no setting 'epoch'; did you mean 'epochs'"):
        update(Example(), dict(run=dict(epoch=1)))


def test_the_difference_of_two():
    other = apply_options(Example(), ["model.strides=4", "losses.ssl=1"])
    lines = diff(to_dict(Example()), to_dict(other))
    assert lines == ["losses: {} → absent", "losses.ssl: absent → 1.0", "model.strides: [8, 16] → [4]"]
    assert diff(to_dict(other), to_dict(other)) == []


def test_flatten():
    assert flatten(dict(a=dict(b=1, c={}), d=2)) == {"a.b": 1, "a.c": {}, "d": 2}
