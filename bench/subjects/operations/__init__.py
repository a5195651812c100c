"""One operation against its peers: `python bench/run.py --op NAME`."""

from . import attention, bias_softmax, fusion, importance, warp, window_bias
from .operation import Operation, make_workload

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        warp.MULTI_DEPTH_WARP,
        warp.BEV_WARP,
        attention.CROSS_CAMERA_ATTENTION,
        window_bias.WINDOW_BIAS_ATTENTION,
        bias_softmax.BIAS_SOFTMAX,
        fusion.GATED_FUSION,
        importance.TRAJECTORY_IMPORTANCE,
    )
}

__all__ = ["OPERATIONS", "Operation", "make_workload"]
