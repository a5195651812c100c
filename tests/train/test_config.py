"""Settings: typed overrides, JSON, differences, and the experiments by name."""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from rigfuse.train.config import (
    Experiment,
    OptimConfig,
    Range,
    ScheduleConfig,
    Share,
    apply_options,
    check,
    diff,
    dumps,
    flatten,
    to_dict,
    update,
)
from support.settings import numbers


@dataclass
class Sizes:
    weights: str | None = None
    share: Share | None = None
    angle: Annotated[float, Range(at_least=-180, below=180)] = 0.0
    strides: tuple[int, ...] = (8, 16)
    names: tuple[str, ...] = ()

    def validate(self):
        if self.strides != tuple(sorted(self.strides)):
            raise ValueError(f"strides are {self.strides}, need to rise")


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
        ("losses.sl=2", "no setting 'losses.sl'; did you mean 'losses.ssl'?"),
        ("losses={'ssk': 2}", "no setting 'losses.ssk'; did you mean 'losses.ssl'?"),
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
        apply_options(Example(losses=dict(ssl=1.0)), [option])
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


# ---- ranges


MAY_BE_ZERO = {
    *(
        "losses",
        "optim.base_batch",
        "optim.weight_decay",
        "optim.betas",
        "optim.multipliers",
        "optim.clip",
        "optim.freeze_until",
    ),
    *(
        "schedule.warmup_steps",
        "schedule.warmup_epochs",
        "schedule.warmup_factor",
        "schedule.final_factor",
        "schedule.milestones",
    ),
    *("schedule.momentum_factor", "loader.workers", "loader.max_bad_files", "run.seed", "run.ema"),
    *("run.checkpoint_steps", "run.max_skipped", "run.profile_steps"),
}


def test_every_number_has_a_range_that_is_kept():
    names = [name for name, _, _ in numbers(Experiment())]
    assert len(names) > 25 and set(names) >= MAY_BE_ZERO
    for place, name in enumerate(names):
        for value in (-1, -math.inf, math.nan, math.inf, 10**400, 0):
            experiment = Experiment()
            check(experiment)
            _, limits, write = list(numbers(experiment))[place]
            assert limits is not None, name
            write(value)
            if value == 0 and name in MAY_BE_ZERO:
                check(experiment)
                continue
            with pytest.raises(ValueError, match=f"{name}(.x)? is .*, needs") as error:
                check(experiment)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option, message",
    [
        ("run.accumulate=-2", "run.accumulate is -2, needs at least 1"),
        ("optim.clip=-1", "optim.clip is -1.0, needs at least 0"),
        ("optim.lr=1e999", "optim.lr is inf, needs a finite number"),
        ("optim.betas=0.9,1", "optim.betas is 1.0, needs at least 0 and below 1"),
        ("optim.multipliers.neck=-1", "optim.multipliers.neck is -1.0, needs at least 0"),
        ("losses.ssl=-1", "losses.ssl is -1.0, needs at least 0"),
        ("schedule.milestones=0.5,1.5", "schedule.milestones is 1.5, needs at least 0 and at most 1"),
        ("model.share=2", "model.share is 2.0, needs at least 0 and at most 1"),
        ("model.angle=180", "model.angle is 180.0, needs at least -180 and below 180"),
        ("model.share=x", "model.share is 'x', needs float at least 0 and at most 1"),
        ("run.timeout=0", "run.timeout is 0.0, needs above 0"),
        ("run.seed=-1", "run.seed is -1, needs at least 0"),
    ],
)
def test_an_option_out_of_range_is_refused_where_it_is_set(option, message):
    with pytest.raises(ValueError) as error:
        apply_options(Example(), [option])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "option, message",
    [
        ("model.strides=16,8", r"model.strides are \(16, 8\), need to rise"),
        ("schedule.milestones=0.9,0.65", r"schedule.milestones are \(0.9, 0.65\), need to rise"),
        ("run.profile_steps=20,10", "run.profile_steps are 20, 10, need a first step before the last"),
        ("optim.freeze=backbone.", "optim.freeze has a pattern with an empty part: 'backbone.'"),
        ("metric=errr", r"metric is 'errr'; did you mean 'error'\?"),
    ],
)
def test_what_depends_on_several_settings_is_checked_too(option, message):
    example = apply_options(Example(metric="error"), [option])
    example.figure_names = lambda: ("error", "count")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check(example)


def test_what_code_has_set_is_checked_like_an_option():
    example = Example(metric="anything")
    check(example)  # no names are known, so any may be right
    for name, value in (("weights", 3), ("strides", (8.5,)), ("names", "CAM"), ("share", -0.1)):
        other = Example()
        setattr(other.model, name, value)
        with pytest.raises(ValueError, match=f"model.{name} is "):
            check(other)
    example.losses["ssl"] = -1.0
    with pytest.raises(ValueError, match="losses.ssl is -1.0, needs at least 0"):
        check(example)
