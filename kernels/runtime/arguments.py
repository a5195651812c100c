"""An operation's tensor arguments as a table, held to it in one call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .autocast import autocast_dtype, to_autocast_dtype
from .checks import FLOAT_DTYPES, INDEX_DTYPES, Dims, Shapes, check_dense, check_dtype, check_same_device

MOST_TENSORS = 16  # of a list
MOST_REMEMBERED = 256  # kinds of calls that one table remembers to have let pass

_TYPES = (torch.Tensor, torch.nn.Parameter)  # whose sizes are numbers

Dtypes = Callable[[torch.dtype], Sequence[torch.dtype]]


def any_float(first: torch.dtype) -> Sequence[torch.dtype]:
    """Every float dtype, whatever the first argument has."""
    return FLOAT_DTYPES


def same_float(first: torch.dtype) -> Sequence[torch.dtype]:
    """The first argument's dtype."""
    return (first,)


def geometry(first: torch.dtype) -> Sequence[torch.dtype]:
    """float32 whatever the first argument has; beside float64 it may be float64 too."""
    return (torch.float32, torch.float64) if first == torch.float64 else (torch.float32,)


def wide_only_beside_wide(first: torch.dtype) -> Sequence[torch.dtype]:
    """Every float dtype, but float64 only beside a first argument in float64."""
    return FLOAT_DTYPES if first == torch.float64 else FLOAT_DTYPES[:3]


def index(first: torch.dtype) -> Sequence[torch.dtype]:
    """int32 or int64."""
    return INDEX_DTYPES


def boolean(first: torch.dtype) -> Sequence[torch.dtype]:
    """bool."""
    return (torch.bool,)


@dataclass(frozen=True)
class Argument:
    """One tensor argument, or a list of them.

    dims: its forms, each a tuple of sizes and names of sizes; None = any shape, which the operation checks itself. In a
        list each tensor has its own size of a name that ends in "_": "H_" is H_0 of the first one.
    dtypes: the dtypes it may have, given that of the first argument.
    gradient: whether it gets one. A tensor without is refused where it requires grad.
    optional: whether it may be None.
    autocast: whether it follows autocast, as the inputs of matrix products do.
    many: whether it is a list of one or more tensors. Only an operation's first argument may be one.
    """

    dims: tuple[Dims, ...] | None
    dtypes: Dtypes
    gradient: bool = False
    optional: bool = False
    autocast: bool = False
    many: bool = False

    def of(self, number: int) -> "Argument":
        """The tensor of that number in the list."""
        own = lambda dim: f"{dim}{number}" if isinstance(dim, str) and dim.endswith("_") else dim  # noqa: E731
        return replace(self, dims=tuple(tuple(map(own, form)) for form in self.dims), many=False)


class Arguments:
    """The table of one operation's tensors, in the order in which its backends take them.

    limits: name of a size → smallest and largest that it may have (None = no limit).
    """

    def __init__(
        self, operation: str, limits: Mapping[str, tuple[int, int | None]] | None = None, **arguments: Argument
    ):
        self.operation = operation
        self.limits = limits or {}
        self.arguments = arguments
        self.gradients = [name for name, argument in arguments.items() if argument.gradient]
        (name, first), *others = arguments.items()
        counts = range(1, MOST_TENSORS + 1) if first.many else ()
        listed = ({f"{name}[{number}]": first.of(number) for number in range(count)} for count in counts)
        # Beforehand, since torch.compile cannot trace the making of a table.
        self._of_lists = [Arguments(operation, limits, **tensors, **dict(others)) for tensors in listed]
        self._follow = [argument.autocast for argument in arguments.values()]
        self._sizes_of = lru_cache(MOST_REMEMBERED)(lambda kind: [])  # empty until a call of this kind has passed

    def of_list(self, count: int) -> "Arguments":
        """The table with `count` ≥ 1 tensors, "maps[0]", "maps[1]", …, in the place of a list "maps".

        Raises:
            ValueError: `count` is more than MOST_TENSORS.
        """
        if count > MOST_TENSORS:
            name = next(iter(self.arguments))
            raise ValueError(f"{self.operation}: {name} has {count} tensors, needs at most {MOST_TENSORS}")
        return self._of_lists[count - 1]

    def check(self, *tensors: torch.Tensor | None, **sizes: int) -> tuple[list[torch.Tensor | None], dict[str, int]]:
        """Holds `tensors` to the table: shapes, then dtypes, then devices, then who requires grad.

        sizes: sizes known beforehand, by name.

        Returns the tensors, in the autocast dtype where they follow it, and all sizes by name, not to be changed.

        Raises:
            ValueError: a shape, size or device does not fit, or a tensor without gradient requires grad.
            TypeError: an argument is no dense tensor, or its dtype is not allowed.
        """
        if torch.compiler.is_compiling():
            return self._check(tensors, sizes)
        kind = _kind(tensors, sizes)
        if kind is None:
            return self._check(tensors, sizes)
        passed = self._sizes_of(kind)
        if not passed:
            prepared, sizes = self._check(tensors, sizes)
            passed.append(sizes)
            return prepared, sizes
        follow = self._follow if autocast_dtype(tensors[0].device.type) else ()
        return [*map(_prepared, tensors, follow), *tensors[len(follow) :]], passed[0]

    def _check(self, tensors, sizes):
        operation, shapes = self.operation, Shapes(self.operation, **sizes)
        rows = [row for row in zip(self.arguments, self.arguments.values(), tensors) if not self._is_absent(row)]
        for name, argument, tensor in rows:
            if argument.dims is None:
                check_dense(operation, name, tensor)
            else:
                shapes.bind_one_of(name, tensor, argument.dims)
                self._check_limits(name, argument.dims, shapes.sizes)
        cast = [to_autocast_dtype(tensor) if argument.autocast else tensor for _, argument, tensor in rows]
        first_name, first = rows[0][0], cast[0]
        for (name, argument, _), tensor in zip(rows, cast):
            check_dtype(operation, name, tensor, argument.dtypes(first.dtype))
        for name, _, tensor in rows:
            check_same_device(operation, first_name, first, **{name: tensor})
        if torch.is_grad_enabled():
            for name, argument, tensor in rows:
                if tensor.requires_grad and not argument.gradient:
                    raise ValueError(
                        f"{operation}: {name} requires grad, but gets no gradient; pass {name}.detach()"
                    )  # fmt: skip
        prepared = {name: tensor for (name, *_), tensor in zip(rows, cast)}
        return [prepared.get(name) for name in self.arguments], shapes.sizes

    @staticmethod
    def _is_absent(row):
        _, argument, tensor = row
        return tensor is None and argument.optional

    def _check_limits(self, name, forms, sizes):
        for dim in forms[0]:
            low, high = self.limits.get(dim, (0, None))
            if dim in sizes and not (low <= sizes[dim] and (high is None or sizes[dim] <= high)):
                needed = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{self.operation}: {name} has {dim} = {sizes[dim]}, needs {needed}")


def _prepared(tensor, follows):
    return to_autocast_dtype(tensor) if follows and tensor is not None else tensor


def _kind(tensors, sizes):
    """What the outcome of a check depends on, where these are tensors of torch's own type; else None."""
    kind = [*sizes.values(), torch.is_grad_enabled()]
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
        elif type(tensor) in _TYPES and not tensor.is_nested:
            kind += (tensor.shape, tensor.dtype, tensor.layout, tensor.device, tensor.requires_grad)
        else:
            return None
    if tensors[0] is not None:
        kind.append(autocast_dtype(tensors[0].device.type))
    return tuple(kind)
