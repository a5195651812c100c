"""Triton backend. Neither direction stores a plane, uses atomics or clears a buffer."""

from .backward import launch_backward
from .forward import launch_forward

__all__ = ["launch_backward", "launch_forward"]
