"""Every number in a tree of settings, for tests that try the values it must not have."""

from dataclasses import is_dataclass
from typing import Annotated, get_args, get_origin, get_type_hints


def numbers(config, prefix=""):
    """(name, its range or None, a function that writes a value there) of every number in a tree of settings."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{name}.")
            continue
        outer = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        place = {tuple: 0, dict: 1}.get(get_origin(outer))
        inner = kind if place is None else get_args(outer)[place]
        if (get_args(inner)[0] if get_origin(inner) is Annotated else inner) not in (int, float):
            continue
        limits = get_args(inner)[1] if get_origin(inner) is Annotated else None

        def write(number, config=config, name=name, value=value, kind=get_origin(outer)):
            if kind is tuple:
                number = (number, *value[1:])
            setattr(config, name, {"x": number} if kind is dict else number)

        yield prefix + name, limits, write
