"""Experiments as dataclasses: typed overrides from the command line, checks, JSON, and the difference of two.

An `Experiment` is settings plus what the trainer needs from the task: the network, the data, the evaluation. Every
system derives its own (see `systems/`) and has functions that return filled ones.

A setting says in its type which values it may have, and `check` holds it to that before anything is built:

    heads: Count = 8                                            # 1, 2, …
    dropout: Share = 0.1                                        # 0 to 1
    depths: tuple[Positive, ...] = (10.0, 30.0)
    angle: Annotated[float, Range(at_least=-180, below=180)] = 0.0
    kind: Literal["concat", "sum"] = "concat"

No number may be NaN or infinite. What depends on several settings belongs into a method `validate(self)` of the
dataclass, which raises ValueError with a message that begins with the setting's name.
"""

import ast
import json
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..modules.settings import Count, Momentum, NonNegative, Positive, Range, Share, Whole
from .command_line import nearest


@dataclass
class OptimConfig:
    """AdamW. Patterns name parameters by whole parts of their dotted name, see `optim.matches`."""

    lr: Positive = 4e-4
    base_batch: Whole = 0  # lr is for so many samples a step, over all ranks, and follows what a step has; 0 = it stays
    batch_rule: Literal["linear", "sqrt"] = "linear"  # how it follows
    weight_decay: NonNegative = 1e-3
    decay: Literal["all", "matrices"] = "all"  # matrices: spare what has fewer than two axes (norms, biases, scales)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    multipliers: dict[str, NonNegative] = field(default_factory=dict)  # pattern → factor on lr; 0 freezes
    freeze: tuple[str, ...] = ()  # patterns that get no gradient in any step
    freeze_until: dict[str, Whole] = field(default_factory=dict)  # pattern → the first step in which it trains
    clip: NonNegative = 25.0  # largest gradient norm; 0 = no clipping

    def validate(self) -> None:
        for name in ("multipliers", "freeze", "freeze_until"):
            if any(not part for pattern in getattr(self, name) for part in pattern.split(".")):
                raise ValueError(
                    f"{name} has a pattern with an empty part: {', '.join(map(repr, getattr(self, name)))}"
                )


@dataclass
class ScheduleConfig:
    """How the learning rate changes over the run; see `optim.factor`."""

    kind: Literal["cosine", "multistep", "cyclic", "constant"] = "cosine"
    warmup_steps: Whole = 500  # as many samples as these steps have when the run begins; cyclic has no warm-up
    warmup_epochs: NonNegative = 0.0  # the warm-up is no longer than this; 0 = however long it is
    warmup_factor: Share = 0.1  # of lr, at the first step
    final_factor: Share = 0.0  # of lr, where the cosine or the cycle ends
    milestones: tuple[Share, ...] = (0.65, 0.9)  # multistep: fractions of the run …
    gamma: Positive = 0.1  # … after which lr is multiplied by this
    peak_factor: Positive = 10.0  # cyclic: of lr, at the peak
    peak_at: Annotated[float, Range(above=0, below=1)] = 0.4  # cyclic: the fraction of the run at which the peak is
    momentum_factor: Share = 0.85 / 0.95  # cyclic: of Adam's beta1, at the peak

    def validate(self) -> None:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {self.milestones}, need to rise")


@dataclass
class LoaderConfig:
    batch_size: Count = 1  # on each rank
    workers: Whole = 4  # processes on each rank; 0 = load in the training process
    max_bad_files: Whole = 20  # broken or missing files on a rank before the run stops


@dataclass
class RunConfig:
    epochs: Count = 24
    seed: Annotated[int, Range(at_least=0, below=2**63)] = 0
    accumulate: Count = 1  # batches in one step
    amp: Literal["float32", "bfloat16", "float16"] = "float32"
    ema: Momentum = (
        0.0  # decay of a moving average of the weights, which is evaluated and used in their place; 0 = none
    )
    deterministic: bool = False
    checkpoint_steps: Whole = 0  # a checkpoint every so many steps, besides one an epoch; 0 = none
    keep: Count = 3  # newest checkpoints kept, besides the best
    evaluate_epochs: Count = 1  # evaluate every so many epochs, and after the last
    log_steps: Count = 50
    tensorboard: bool = True
    max_skipped: Whole = 20  # steps in a row that may be skipped for a loss or gradient that is not finite
    timeout: Annotated[float, Range(above=0, at_most=1e6)] = 600.0  # seconds a rank waits for the others
    profile_steps: tuple[Whole, Whole] = (10, 20)  # what --profile records

    def validate(self) -> None:
        start, stop = self.profile_steps
        if start >= stop:
            raise ValueError(f"profile_steps are {start}, {stop}, need a first step before the last")


@dataclass
class Experiment:
    """Settings that every task has. A task adds `model` and `data` and defines the methods.

    `metric` names the figure of `evaluate` that decides which checkpoint is the best; smaller is better unless
    `metric_mode` is "max". `losses` has every loss that the network may return.
    """

    name: str = ""
    losses: dict[str, NonNegative] = field(default_factory=dict)  # loss → weight
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    run: RunConfig = field(default_factory=RunConfig)
    metric: str = ""
    metric_mode: Literal["min", "max"] = "min"

    def build_model(self):
        """The network: `model(batch)` returns an object with `losses`, a dict of unweighted scalars.

        It may have `figures` too, a dict of scalars to log beside the losses.
        """
        raise NotImplementedError

    def build_data(self):
        """(training set, validation set), map-style; item (epoch, index) depends on these and the seed alone."""
        raise NotImplementedError

    def collate(self, items: list):
        """A batch with `to(device)`; where it has `bad_files`, the trainer counts them."""
        raise NotImplementedError

    def evaluate(self, model, loader) -> dict[str, float]:
        """Figures over all ranks' shares of the validation set. `loader` gives batches on the device."""
        raise NotImplementedError

    def approve(self, model) -> None:
        """Raises TrainingError where this network must not be trained as it is, before anything is written."""

    def lines(self, figures: Mapping[str, float]) -> list[str]:
        """What the log says beside the figures of each record of training, in lines."""
        return []

    def watch(self, model, batch, output, step: int, folder: Path) -> None:
        """Looks at what a step has seen and said, on the first rank; a task may draw it into the run's folder."""

    def remarks(self, model) -> list[str]:
        """What is odd about the network as it begins to train, in lines that the log shows."""
        return []

    def figure_names(self) -> tuple[str, ...]:
        """What `metric` may be, so that a mistake is seen before training; empty = seen at the first evaluation."""
        return ()


def check(config: Any, prefix: str = "") -> None:
    """Holds every setting of a tree of dataclasses to its type and range, then to the dataclasses' `validate`.

    Raises:
        ValueError: one line that names the setting, what it is and what it needs.
    """
    for name, kind in _hints(config).items():
        value = getattr(config, name)
        if is_dataclass(value):
            check(value, f"{prefix}{name}.")
        else:
            _convert(kind, value, prefix + name)
    try:
        if hasattr(config, "validate"):
            config.validate()
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
    if isinstance(config, Experiment):
        for name, weight in config.losses.items():
            _convert(NonNegative, weight, f"losses.{name}")
        names = config.figure_names()
        if names and config.metric not in names:
            raise ValueError(f"metric is {config.metric!r}{nearest(config.metric, names)}")


def apply_options(config: Any, options: Iterable[str]) -> Any:
    """Sets `a.b=c` in a tree of dataclasses, in place; values are read by the field's type.

    Raises:
        ValueError: not of that form, no such key (with the nearest one), or a value of the wrong type.
    """
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"option {option!r} has no '='; write key=value, like run.epochs=2")
        _set(config, key.strip(), lambda kind, key=key, value=value: _parse(kind, value.strip(), key.strip()))
    return config


def to_dict(config: Any) -> dict:
    """Plain types only, as JSON has them."""
    return json.loads(json.dumps(asdict(config)))


def update(config: Any, values: dict) -> Any:
    """Fills a tree of dataclasses from `to_dict`'s result, in place, as strictly as `apply_options`."""
    for key, value in values.items():
        kind = _hints(config).get(key)
        if kind is None:
            raise ValueError(_unknown(key, [f.name for f in fields(config)]))
        if is_dataclass(kind):
            update(getattr(config, key), value)
        else:
            setattr(config, key, _convert(kind, value, key))
    return config


def dumps(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2)


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def diff(a: dict, b: dict) -> list[str]:
    """One line `key: old → new` for each setting in which two `to_dict` results differ."""
    a, b = flatten(a), flatten(b)
    show = lambda values, key: json.dumps(values[key]) if key in values else "absent"  # noqa: E731
    return [f"{key}: {show(a, key)} → {show(b, key)}" for key in sorted({*a, *b}) if show(a, key) != show(b, key)]


def _hints(config):
    """Field → type; a field whose annotation only says Any has the type of its value."""
    hints = get_type_hints(type(config), include_extras=True)
    return {f.name: type(getattr(config, f.name)) if hints[f.name] is Any else hints[f.name] for f in fields(config)}


def _unknown(key, known):
    return f"no setting {key!r}{nearest(key, known)}"


def _set(root, key, make):
    config, parts = root, key.split(".")
    for place, part in enumerate(parts):
        kind = _hints(config).get(part)
        rest = parts[place + 1 :]
        if kind is None or bool(rest) != (is_dataclass(kind) or (get_origin(kind) is dict and bool(rest))):
            raise ValueError(_unknown(key, flatten(asdict(root))))
        if get_origin(kind) is dict and rest:
            change = {".".join(rest): make(get_args(kind)[1])}
            _check_losses(root, key, change)
            getattr(config, part).update(change)
            return
        if not rest:
            value = make(kind)
            _check_losses(root, key, value)
            setattr(config, part, value)
            return
        config = getattr(config, part)


def _check_losses(root, key, change):
    """The losses of an experiment are those that it declares, unlike the patterns of other dicts."""
    known = root.losses if isinstance(root, Experiment) and key.split(".")[0] == "losses" else {}
    for name in change if known else ():
        if name not in known:
            raise ValueError(_unknown(f"losses.{name}", [f"losses.{loss}" for loss in known]))


def _plain(kind):
    """The type without its range."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _parse(kind, text, key):
    """Text of the command line → what JSON would hold → the type."""
    plain = _plain(kind)
    origin = get_origin(plain)
    if plain is str or origin is Literal:
        return _convert(kind, text, key)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return _convert(kind, None, key)
        return _parse(next(k for k in get_args(plain) if k is not types.NoneType), text, key)
    if plain is bool:
        return _convert(kind, {"true": True, "false": False}.get(text.lower(), text), key)
    if origin is tuple and get_args(plain)[0] is str and text[:1] not in ("[", "("):
        return _convert(kind, [part.strip() for part in text.split(",") if part.strip()], key)
    if origin is tuple and text[:1] not in ("[", "("):
        text = f"[{text}]"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(_wrong(kind, text, key)) from None
    return _convert(kind, value, key)


def _convert(kind, value, key):
    """The value as this type has it; ValueError where it is none of its values."""
    if get_origin(kind) is Annotated:
        plain, limits = get_args(kind)
        value = _convert(plain, value, key)
        if not limits.holds(value):
            raise ValueError(f"{key} is {value!r}, needs {limits}")
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key} is {value!r}{nearest(str(value), map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _convert(next(k for k in arguments if k is not types.NoneType), value, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_convert(k, v, key) for k, v in zip(kinds, value))
    elif origin is dict and isinstance(value, dict):
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{key} is {value!r}, needs a finite number")
        return float(value)
    elif kind in (int, bool, str) and type(value) is kind:
        if kind is int and abs(value) >= 2**63:
            raise ValueError(f"{key} is {value}, needs fewer than 20 digits")
        return value
    raise ValueError(_wrong(kind, value, key))


def _wrong(kind, value, key):
    return f"{key} is {value!r}, needs {_named(kind)}"


def _named(kind):
    """int · tuple[float, float] · str | None · float above 0"""
    if get_origin(kind) is Annotated:
        plain, limits = get_args(kind)
        return f"{_named(plain)} {limits}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("none" if k is types.NoneType else _named(k) for k in get_args(kind))
    if get_origin(kind) in (tuple, dict):
        parts = ("..." if part is Ellipsis else _named(_plain(part)) for part in get_args(kind))
        return f"{get_origin(kind).__name__}[{', '.join(parts)}]"
    return kind.__name__ if isinstance(kind, type) else str(kind)
