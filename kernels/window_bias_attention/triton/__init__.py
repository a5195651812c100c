"""Triton backend: flash attention in which a program reads keys of one map only, so each query has one window there."""

from .backward import launch_backward
from .forward import launch_forward

__all__ = ["launch_backward", "launch_forward"]
