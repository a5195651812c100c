"""The same networks on other operations.

`rigfuse.modules` calls its operations by their names in `rigfuse.kernels`. Within `operations_of(NAME)` these names
mean what `IMPLEMENTATIONS[NAME]` has for them, whatever network runs.
"""

import sys

import torch
from torch.utils.checkpoint import checkpoint

from .. import kernels
from .eager import eager_attention, eager_fusion
from .peers import gathered_sdpa, grid_sample_warp

TOOLKIT, EAGER, SDPA, REFERENCE = "rigfuse", "eager", "sdpa", "reference"
_REFERENCE_QUERIES = 512
_MODULES = f"{kernels.__name__.rpartition('.')[0]}.modules."


def _warp(features, projection, depths, *, weights=None, offsets=None, backend=None):
    with torch.autocast(features.device.type, enabled=False):  # or the geometry would be computed in half precision
        return grid_sample_warp(features, projection, depths, weights=weights, offsets=offsets)


def _attention_by(function):
    def attend(query, key, value, block_table, *, key_mask=None, backend=None):
        if key_mask is None:
            key_mask = key.new_ones(key.shape[:2], dtype=torch.bool)
        return function(query, key, value, block_table, key_mask)

    return attend


def _fusion(original, completed, gate_logits, *, fine=None, importance=None, backend=None):
    if fine is None:
        return eager_fusion(original, completed, gate_logits)
    return kernels.gated_fusion(original, completed, gate_logits, fine=fine, importance=importance, backend="torch")


def _importance(points, valid, size, *, sigma, backend=None):
    return kernels.trajectory_importance(points, valid, size, sigma=sigma, backend="torch")


def sliced_attention(query, *others):
    """Stored scores, of some queries after others: so float64 scores of a large case fit."""
    slices = query.split(_REFERENCE_QUERIES, dim=1)
    return torch.cat([checkpoint(eager_attention, part, *others, use_reentrant=False) for part in slices], dim=1)


_PLAIN = dict(multi_depth_warp=_warp, gated_fusion=_fusion, trajectory_importance=_importance)
IMPLEMENTATIONS = {
    TOOLKIT: {},
    EAGER: {**_PLAIN, "cross_camera_attention": _attention_by(eager_attention)},
    SDPA: {**_PLAIN, "cross_camera_attention": _attention_by(gathered_sdpa)},
    REFERENCE: {**_PLAIN, "cross_camera_attention": _attention_by(sliced_attention)},
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
