"""Fused operations for a camera rig. Importing this does not import triton."""

from ._runtime.backends import BackendError
from .gated_fusion.api import gated_fusion

__all__ = ["BackendError", "gated_fusion"]
