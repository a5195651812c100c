"""Parameter groups by pattern, freezing, and the learning rate over a run."""

import pytest
import torch
from torch import nn

from rigfuse.train.config import OptimConfig, ScheduleConfig
from rigfuse.train.optim import build_optimizer, build_schedule, factor, matches, parameter_groups


def model():
    return nn.ModuleDict(
        dict(
            img_backbone=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
            attention_bias_generator=nn.ModuleDict(dict(bias_scale=nn.Linear(1, 1), mlp=nn.Linear(2, 2))),
            task_heads=nn.Linear(2, 1),
        )
    )


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ("img_backbone", "img_backbone.0.weight", True),
        ("img_backbone", "module.img_backbone.0.weight", True),
        ("backbone", "img_backbone.0.weight", False),
        ("*backbone", "img_backbone.0.weight", True),
        ("temporal.gate", "temporal.gate.0.bias", True),
        ("temporal.gate", "temporal.gated.bias", False),
        ("gate.temporal", "temporal.gate.bias", False),
        ("weight", "weight", True),
    ],
)
def test_a_pattern_is_held_to_whole_parts_of_the_name(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_groups_take_the_longest_pattern_and_zero_freezes():
    multipliers = {
        "img_backbone": 0.0,
        "attention_bias_generator": 0.5,
        "attention_bias_generator.bias_scale": 0.25,
        "bias_scale": 0.125,
    }
    network = model()
    groups = {group["name"]: group for group in parameter_groups(network, OptimConfig(lr=0.1, multipliers=multipliers))}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {
        "attention_bias_generator": pytest.approx(0.05),
        "attention_bias_generator.bias_scale": pytest.approx(0.025),
        "base": pytest.approx(0.1),
    }
    assert groups["base"]["params"] == list(network["task_heads"].parameters())
    assert not any(p.requires_grad for p in network["img_backbone"].parameters())
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_what_is_frozen_stays_bitwise():
    network = model()
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, OptimConfig(lr=0.1, freeze=("img_backbone", "mlp"), weight_decay=0.5))
    for _ in range(3):
        hidden = network["attention_bias_generator"]["mlp"](network["img_backbone"](torch.randn(4, 2)))
        network["task_heads"](hidden).sum().backward()
        optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"task_heads.weight", "task_heads.bias"}


def test_a_pattern_without_a_match_names_the_nearest():
    with pytest.raises(ValueError, match="'img_backbon' matches no parameter; did you mean 'img_backbone'"):
        parameter_groups(model(), OptimConfig(freeze=("img_backbon",)))
    with pytest.raises(ValueError, match="did you mean 'attention_bias_generator.bias_scale'"):
        parameter_groups(model(), OptimConfig(multipliers={"attention_bias_generator.bias_scales": 0.5}))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(model(), OptimConfig(freeze=("*",)))


def test_warm_up_then_cosine():
    config = ScheduleConfig(warmup_steps=10, warmup_factor=0.1, final_factor=0.01)
    assert factor(config, 0, 110) == pytest.approx(0.1)
    assert factor(config, 5, 110) == pytest.approx(0.55)
    assert factor(config, 10, 110) == 1
    assert factor(config, 60, 110) == pytest.approx((1 + 0.01) / 2)
    assert factor(config, 110, 110) == pytest.approx(0.01)
    assert all(factor(config, step, 110) > factor(config, step + 1, 110) for step in range(10, 110))


def test_multistep_falls_at_its_milestones():
    """System E: ×0.1 at 65 % and 90 % of the steps."""
    config = ScheduleConfig(kind="multistep", warmup_steps=0)
    expected = {0: 1, 64: 1, 65: 0.1, 89: 0.1, 90: 0.01, 99: 0.01}
    assert {step: factor(config, step, 100) for step in expected} == pytest.approx(expected)


def test_the_schedule_reaches_every_group_in_proportion():
    optimizer = build_optimizer(model(), OptimConfig(lr=0.1, multipliers={"task_heads": 0.5}))
    schedule = build_schedule(optimizer, ScheduleConfig(warmup_steps=4, warmup_factor=0.5), total=20)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"base": pytest.approx(0.05), "task_heads": pytest.approx(0.025)}
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.05])
