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


def learning_rate(config: OptimConfig, samples: int = 0) -> float:
    """`config.lr`, or with `config.base_batch` what belongs to a step of so many `samples` over all ranks."""
    if not config.base_batch or not samples:
        return config.lr
    ratio = samples / config.base_batch
    return config.lr * (ratio if config.batch_rule == "linear" else math.sqrt(ratio))


def parameter_groups(model: nn.Module, config: OptimConfig, samples: int = 0) -> list[dict]:
    """Freezes what is to be frozen, and groups the rest by the pattern that applies, the longest if there are several.

    Each group has `params`, `lr`, `weight_decay` and `name` (the pattern, or "base").

    Args:
        model: gets its `requires_grad` set.
        config: patterns and rates.
        samples: in a step over all ranks, for `learning_rate`.

    Raises:
        ValueError: a pattern matches no parameter (with the nearest name), or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    multipliers = dict(config.multipliers) | dict.fromkeys(config.freeze, 0.0)
    for pattern in (*multipliers, *config.freeze_until):
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"optim: the pattern {pattern!r} matches no parameter{nearest(pattern, _prefixes(names))}")
    groups, lr = {}, learning_rate(config, samples)
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
        decay = 0.0 if config.decay == "matrices" and parameter.ndim < 2 else config.weight_decay
        new = dict(params=[], lr=lr * multiplier, weight_decay=decay, name=pattern)
        groups.setdefault((pattern, decay), new)["params"].append(parameter)
    if not groups:
        raise ValueError("optim: every parameter is frozen, nothing is left to train")
    return list(groups.values())


class FreezeSchedule:
    """Freezes parameters by pattern until a step (`OptimConfig.freeze_until`); the latest step of several counts.

    Args:
        model: after `parameter_groups`, whose groups hold what is frozen here too: it may train later.
        until: pattern → the first step in which it trains.
    """

    def __init__(self, model: nn.Module, until: dict[str, int]):
        found = {}
        for name, parameter in model.named_parameters():
            steps = [step for pattern, step in until.items() if matches(pattern, name)]
            if steps and parameter.requires_grad:
                found[name] = parameter, max(steps)
        self._parameters = found

    @property
    def names(self) -> set[str]:
        """The parameters that are frozen at first."""
        return set(self._parameters)

    def apply(self, step: int) -> list[str]:
        """Freezes what is frozen in this step and lets the rest train; returns what changed by it."""
        changed = []
        for name, (parameter, until) in self._parameters.items():
            if parameter.requires_grad != (step >= until):
                parameter.requires_grad_(step >= until)
                changed.append(name)
        return changed


def set_training(model: nn.Module) -> None:
    """`model.train()`, but a module whose parameters are all frozen stays in evaluation.

    So its batch norms keep their statistics and it drops nothing: what is frozen computes the same in every step.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def build_optimizer(model: nn.Module, config: OptimConfig, samples: int = 0) -> torch.optim.AdamW:
    """See `parameter_groups`."""
    groups = parameter_groups(model, config, samples)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter → what the optimiser remembers of it. By name, so that it survives other groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: state for parameter, state in optimizer.state.items()}


def load_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, dict[str, torch.Tensor]],
    scheduled: set[str] = frozenset(),
) -> None:
    """Gives the optimiser what `moments` returned; rates, decay and betas stay those it was built with.

    Parameters of `scheduled` may have begun to train, or not yet.

    Raises:
        ValueError: they are of other parameters than those that train now; the message names some.
    """
    parameters = dict(model.named_parameters())
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if saved and saved.keys() - scheduled != trained - scheduled:
        gone, new = saved.keys() - trained, trained - saved.keys() - scheduled
        for names, what in ((gone, "no longer train"), (new, "did not train")):
            if names:
                shown = ", ".join(sorted(names)[:3])
                raise ValueError(f"{len(names)} parameters {what}: {shown}{', …' if len(names) > 3 else ''}")
    places = {parameter: place for place, parameter in enumerate(order)}
    state = {places[parameters[name]]: values for name, values in saved.items()}
    optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))


class Schedule:
    """Sets the learning rate of every group, and with `cyclic` Adam's beta1, for a place in the run.

    Args:
        optimizer: as built: its rates are those that the schedule multiplies.
        config: the kind and its numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig):
        self.optimizer, self.config = optimizer, config
        self._base = [(group["lr"], group["betas"]) for group in optimizer.param_groups]

    def set(self, step: float, total: float, warmup: float) -> None:
        """The place: `step` of `total`, the first `warmup` of them warm-up. Fractions of steps are places too."""
        rate = factor(self.config, step, total, warmup)
        momentum = momentum_factor(self.config, step, total)
        for group, (lr, (beta1, beta2)) in zip(self.optimizer.param_groups, self._base):
            group["lr"], group["betas"] = lr * rate, (beta1 * momentum, beta2)


def factor(config: ScheduleConfig, step: float, total: float, warmup: float | None = None) -> float:
    """What the learning rate is multiplied by at a step in [0, total): linear warm-up, then the schedule's kind.

    `cyclic` has no warm-up: it rises from 1 to `peak_factor` and falls to `final_factor`, both along half a cosine, as
    mmcv's CyclicLrUpdater does.
    """
    if config.kind == "cyclic":
        return _cycle(config, step / total, 1.0, config.peak_factor, config.final_factor)
    warmup = min(config.warmup_steps if warmup is None else warmup, total)
    ramp = 1.0
    if step < warmup:
        ramp = config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.kind == "multistep":
        return ramp * config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    if config.kind == "constant" or step < warmup:
        return ramp
    return _anneal(1.0, config.final_factor, (step - warmup) / max(total - warmup, 1))


def momentum_factor(config: ScheduleConfig, step: float, total: float) -> float:
    """What Adam's beta1 is multiplied by: with `cyclic` it falls as the learning rate rises, and comes back."""
    return _cycle(config, step / total, 1.0, config.momentum_factor, 1.0) if config.kind == "cyclic" else 1.0


def _cycle(config, done, first, peak, last):
    if done < config.peak_at:
        return _anneal(first, peak, done / config.peak_at)
    return _anneal(peak, last, (done - config.peak_at) / (1 - config.peak_at))


def _anneal(first, last, done):
    """From the one to the other along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def _prefixes(names: Iterable[str]) -> list[str]:
    """Every "a", "a.b", "a.b.c" of the names, and every single part: what a pattern is likely to have meant."""
    found = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(parts) | {".".join(parts[:end]): None for end in range(1, len(parts) + 1)}
    return list(found)
