"""The same networks on other operations.

`rigfuse.modules` calls its operations by their names in `rigfuse.kernels`. Within `operations_of(NAME)` these names
mean what `IMPLEMENTATIONS[NAME]` has for them, whatever network runs.
"""

import sys

import torch
from torch.utils.checkpoint import checkpoint

from .. import kernels
from .peers import gathered_sdpa

TOOLKIT, EAGER, SDPA, REFERENCE = "rigfuse", "eager", "sdpa", "reference"
_REFERENCE_QUERIES = 512
_MODULES = f"{kernels.__name__.rpartition('.')[0]}.modules."


def _definition(operation: str):
    """An operation as its definition computes it: everything stored, differentiated by autograd."""

    def run(*arguments, backend=None, **settings):
        return getattr(kernels, operation)(*arguments, **settings, backend="definition")

    return run


def _sdpa(query, key, value, block_table, *, key_mask=None, backend=None):
    if key_mask is None:
        key_mask = key.new_ones(key.shape[:2], dtype=torch.bool)
    return gathered_sdpa(query, key, value, block_table, key_mask)


def _sliced(query, *others, **settings):
    """The definition, of some queries after others: so float64 scores of a large case fit."""

    def attend(part):
        return EAGER_OPERATIONS["cross_camera_attention"](part, *others, **settings)

    parts = query.split(_REFERENCE_QUERIES, dim=1)
    return torch.cat([checkpoint(attend, part, use_reentrant=False) for part in parts], dim=1)


EAGER_OPERATIONS = {name: _definition(name) for name in kernels.__all__ if name.islower()}
IMPLEMENTATIONS = {
    TOOLKIT: {},
    EAGER: EAGER_OPERATIONS,
    SDPA: {**EAGER_OPERATIONS, "cross_camera_attention": _sdpa},
    REFERENCE: {**EAGER_OPERATIONS, "cross_camera_attention": _sliced},
}


def operation_of(name: str, operation: str):
    """The function that an implementation has for an operation of `rigfuse.kernels`."""
    return IMPLEMENTATIONS[name].get(operation) or getattr(kernels, operation)


class operations_of:  # noqa: N801  a context manager
    """Within, the networks' operations are those of an implementation. A few assignments, so it may be timed.

    Made once a network is built, entered as often as it runs.
    """

    def __init__(self, name: str):
        modules = [module for loaded, module in list(sys.modules.items()) if loaded.startswith(_MODULES)]
        self._places = [
            (module, operation, function)
            for operation, function in IMPLEMENTATIONS[name].items()
            for module in modules
            if getattr(module, operation, None) is getattr(kernels, operation)
        ]

    def __enter__(self):
        for module, operation, function in self._places:
            setattr(module, operation, function)

    def __exit__(self, *exception):
        for module, operation, _ in self._places:
            setattr(module, operation, getattr(kernels, operation))
