"""Which parameters learn, and how fast: groups by name pattern, freezing, and the schedule."""

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from .command_line import nearest
from .config import OptimConfig, ScheduleConfig


def matches(pattern: str, name: str) -> bool:
    """Whether the parts of `pattern` stand side by side in the dotted `name`; each may hold the wildcards * and ?.

    "temporal.gate" matches "temporal.gate.0.weight" and "module.temporal.gate.bias", not "temporal.gated.weight".
    """
    parts, wanted = name.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start:], wanted)) for start in starts)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Freezes what is to be frozen, and groups the rest by the pattern that applies, the longest if there are several.

    Each group has `params`, `lr` and `name` (the pattern, or "base").

    Raises:
        ValueError: a pattern matches no parameter (with the nearest name), or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    multipliers = dict(config.multipliers) | dict.fromkeys(config.freeze, 0.0)
    for pattern in multipliers:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"optim: the pattern {pattern!r} matches no parameter{nearest(pattern, _prefixes(names))}")
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(matches(pattern, name) for pattern in config.freeze):
            parameter.requires_grad_(False)
            continue
        applying = [pattern for pattern in multipliers if matches(pattern, name)]
        pattern = max(applying, key=len, default="base")
        multiplier = multipliers.get(pattern, 1.0)
        if multiplier == 0:
            parameter.requires_grad_(False)
            continue
        group = groups.setdefault(pattern, dict(params=[], lr=config.lr * multiplier, name=pattern))
        group["params"].append(parameter)
    if not groups:
        raise ValueError("optim: every parameter is frozen, nothing is left to train")
    return list(groups.values())


def set_training(model: nn.Module) -> None:
    """`model.train()`, but a module whose parameters are all frozen stays in evaluation.

    So its batch norms keep their statistics and it drops nothing: what is frozen computes the same in every step.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def build_schedule(optimizer, config: ScheduleConfig, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """`total`: steps of the whole run."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(config, step, total))


def factor(config: ScheduleConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied by at a step in [0, total): linear warm-up, then the schedule's kind."""
    warmup = min(config.warmup_steps, total)
    ramp = 1.0
    if step < warmup:
        ramp = config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.kind == "multistep":
        return ramp * config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    if config.kind == "constant" or step < warmup:
        return ramp
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return config.final_factor + (1 - config.final_factor) * (1 + math.cos(math.pi * done)) / 2


def _prefixes(names: Iterable[str]) -> list[str]:
    """Every "a", "a.b", "a.b.c" of the names, and every single part: what a pattern is likely to have meant."""
    found = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(parts) | {".".join(parts[:end]): None for end in range(1, len(parts) + 1)}
    return list(found)
