"""Experiments as dataclasses: typed overrides from the command line, JSON, and the difference of two.

An `Experiment` is settings plus what the trainer needs from the task: the network, the data, the evaluation. Tasks
derive from it (see `tasks/`), and the functions in `configs/` return filled ones.
"""

import ast
import json
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .command_line import nearest


@dataclass
class OptimConfig:
    """AdamW. Patterns name parameters by whole parts of their dotted name, see `optim.matches`."""

    lr: float = 4e-4
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    multipliers: dict[str, float] = field(default_factory=dict)  # pattern → factor on lr; 0 freezes
    freeze: tuple[str, ...] = ()  # patterns that get no gradient in any step
    clip: float = 25.0  # largest gradient norm; 0 = no clipping


@dataclass
class ScheduleConfig:
    kind: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = 500
    warmup_factor: float = 0.1  # of lr, at the first step
    final_factor: float = 0.0  # of lr, where the cosine ends
    milestones: tuple[float, ...] = (0.65, 0.9)  # multistep: fractions of all steps …
    gamma: float = 0.1  # … after which lr is multiplied by this


@dataclass
class LoaderConfig:
    batch_size: int = 1  # on each rank
    workers: int = 4  # processes on each rank; 0 = load in the training process
    max_bad_files: int = 20  # broken or missing files on a rank before the run stops


@dataclass
class RunConfig:
    epochs: int = 24
    seed: int = 0
    accumulate: int = 1  # batches in one step
    amp: Literal["float32", "bfloat16", "float16"] = "float32"
    deterministic: bool = False
    checkpoint_steps: int = 0  # a checkpoint every so many steps, besides one an epoch; 0 = none
    keep: int = 3  # newest checkpoints kept, besides the best
    evaluate_epochs: int = 1  # evaluate every so many epochs, and after the last
    log_steps: int = 50
    tensorboard: bool = True
    max_skipped: int = 20  # steps in a row that may be skipped for a loss or gradient that is not finite
    timeout: float = 600.0  # seconds a rank waits for the others
    profile_steps: tuple[int, int] = (10, 20)  # what --profile records


@dataclass
class Experiment:
    """Settings that every task has. A task adds `model` and `data` and defines the four methods.

    `metric` names the figure of `evaluate` that decides which checkpoint is the best; smaller is better unless
    `metric_mode` is "max".
    """

    name: str = ""
    losses: dict[str, float] = field(default_factory=dict)  # loss → weight
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
    hints = get_type_hints(type(config))
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
            getattr(config, part)[".".join(rest)] = make(get_args(kind)[1])
            return
        if not rest:
            setattr(config, part, make(kind))
            return
        config = getattr(config, part)


def _parse(kind, text, key):
    """Text of the command line → what JSON would hold → the type."""
    origin = get_origin(kind)
    if kind is str or origin is Literal:
        return _convert(kind, text, key)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return _convert(kind, None, key)
        return _parse(next(k for k in get_args(kind) if k is not types.NoneType), text, key)
    if kind is bool:
        return _convert(kind, {"true": True, "false": False}.get(text.lower(), text), key)
    if origin is tuple and get_args(kind)[0] is str and text[:1] not in ("[", "("):
        return _convert(kind, [part.strip() for part in text.split(",") if part.strip()], key)
    if origin is tuple and text[:1] not in ("[", "("):
        text = f"[{text}]"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(_wrong(kind, text, key)) from None
    return _convert(kind, value, key)


def _convert(kind, value, key):
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
        return float(value)
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise ValueError(_wrong(kind, value, key))


def _wrong(kind, value, key):
    name = kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
    return f"{key} is {value!r}, needs {name}"
