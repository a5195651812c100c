"""Parameter groups by pattern, freezing, and the learning rate over a run."""

import pytest
import torch
from torch import nn

from rigfuse.train.config import OptimConfig, ScheduleConfig
from rigfuse.train.optim import (
    FreezeSchedule,
    Schedule,
    build_optimizer,
    factor,
    learning_rate,
    load_moments,
    matches,
    moments,
    momentum_factor,
    parameter_groups,
    set_training,
)


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


def test_a_schedule_freezes_until_a_step():
    network, until = model(), {"img_backbone": 2, "img_backbone.0.bias": 4}
    optimizer = build_optimizer(network, OptimConfig(lr=0.1, freeze_until=until, weight_decay=0.5))
    schedule = FreezeSchedule(network, until)
    assert schedule.names == {f"img_backbone.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    for step in range(6):
        before = {name: p.clone() for name, p in network.state_dict().items()}
        assert len(schedule.apply(step)) == {0: 4, 2: 3, 4: 1}.get(step, 0)
        set_training(network)
        network["task_heads"](network["img_backbone"](torch.randn(4, 2))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in network.state_dict().items() if not torch.equal(p, before[name])}
        frozen = {n for n in before if n.startswith("img_backbone")} if step < 2 else {"img_backbone.0.bias"}
        assert not moved & (frozen if step < 4 else set()) and "task_heads.weight" in moved
        assert ("img_backbone.0.weight" in moved) == (step >= 2) and ("img_backbone.0.bias" in moved) == (step >= 4)
    with pytest.raises(ValueError, match="'img_backbon' matches no parameter; did you mean 'img_backbone'"):
        parameter_groups(model(), OptimConfig(freeze_until={"img_backbon": 9}))


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


def test_a_cycle_rises_to_its_peak_and_falls_as_the_momentum_does_the_opposite():
    """mmcv's CyclicLrUpdater and its momentum: target ratios (8, 1e-4) and 0.85/0.95, 40 % of the steps up."""
    config = ScheduleConfig(kind="cyclic", peak_factor=8.0, peak_at=0.4, final_factor=1e-4, momentum_factor=0.85 / 0.95)
    rates = {0: 1, 20: 4.5, 40: 8, 70: (8 + 1e-4) / 2, 100: 1e-4}
    assert {step: factor(config, step, 100) for step in rates} == pytest.approx(rates)
    momenta = {0: 1, 20: (1 + 0.85 / 0.95) / 2, 40: 0.85 / 0.95, 70: (1 + 0.85 / 0.95) / 2, 100: 1}
    assert {step: momentum_factor(config, step, 100) for step in momenta} == pytest.approx(momenta)
    rising, falling = ([factor(config, step, 100) for step in part] for part in (range(41), range(40, 101)))
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert momentum_factor(ScheduleConfig(), 40, 100) == 1


def test_a_place_may_lie_between_steps():
    config = ScheduleConfig(warmup_factor=0.0)
    assert factor(config, 2.5, 20, warmup=5) == pytest.approx(0.5)
    assert factor(config, 12.5, 20, warmup=5) == pytest.approx(0.5)


def test_the_schedule_reaches_every_group_in_proportion():
    optimizer = build_optimizer(model(), OptimConfig(lr=0.1, betas=(0.9, 0.99), multipliers={"task_heads": 0.5}))
    schedule = Schedule(optimizer, ScheduleConfig(warmup_steps=4, warmup_factor=0.5))
    for step, expected in ((0, (0.05, 0.025)), (4, (0.1, 0.05)), (0, (0.05, 0.025))):
        schedule.set(step, 20, 4)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.99)] * 2
    cyclic = Schedule(build_optimizer(model(), OptimConfig(betas=(0.9, 0.99))), ScheduleConfig(kind="cyclic"))
    for step, beta in ((40, 0.9 * 0.85 / 0.95), (100, 0.9)):
        cyclic.set(step, 100, 0)
        assert cyclic.optimizer.param_groups[0]["betas"] == (pytest.approx(beta), 0.99)


def test_the_rate_follows_the_samples_of_a_step():
    config = OptimConfig(lr=2e-4, base_batch=8)
    assert [learning_rate(config, samples) for samples in (2, 8, 32)] == pytest.approx([5e-5, 2e-4, 8e-4])
    config.batch_rule = "sqrt"
    assert [learning_rate(config, samples) for samples in (2, 8, 32)] == pytest.approx([1e-4, 2e-4, 4e-4])
    assert learning_rate(OptimConfig(lr=2e-4), 32) == 2e-4
    config.multipliers = {"task_heads": 0.5}
    rates = {group["name"]: group["lr"] for group in parameter_groups(model(), config, samples=2)}
    assert rates == pytest.approx({"base": 1e-4, "task_heads": 5e-5})


def test_decay_can_spare_norms_biases_and_scales():
    network = model()
    network["scale"] = nn.ParameterList([nn.Parameter(torch.ones(()))])
    config = OptimConfig(weight_decay=0.1, decay="matrices", multipliers={"task_heads": 0.5})
    groups = build_optimizer(network, config).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in network.named_parameters()} == {
        name: 0.1 if p.ndim == 2 else 0.0 for name, p in network.named_parameters()
    }
    assert sorted(group["name"] for group in groups) == ["base", "base", "task_heads", "task_heads"]
    config.decay = "all"
    assert [group["weight_decay"] for group in build_optimizer(network, config).param_groups] == [0.1, 0.1]


def test_moments_go_by_name_and_not_by_group():
    def trained(config):
        torch.manual_seed(0)
        network = model()
        optimizer = build_optimizer(network, config)
        return network, optimizer

    network, optimizer = trained(OptimConfig(betas=(0.5, 0.9), weight_decay=0.3))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other, grouped = trained(OptimConfig(lr=7.0, multipliers={"task_heads": 0.5, "bias": 2.0}))
    load_moments(other, grouped, moments(network, optimizer))
    for a, b in zip(network.parameters(), other.parameters()):
        assert torch.equal(optimizer.state[a]["exp_avg"], grouped.state[b]["exp_avg"])
        assert optimizer.state[a]["step"] == grouped.state[b]["step"] == 1
    assert {group["lr"] for group in grouped.param_groups} == {7.0, 3.5, 14.0}
    assert {group["betas"] for group in grouped.param_groups} == {(0.9, 0.999)}
    with pytest.raises(ValueError, match="^2 parameters no longer train: task_heads.bias, task_heads.weight$"):
        load_moments(*trained(OptimConfig(freeze=("task_heads",))), moments(network, optimizer))
