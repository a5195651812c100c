"""The version of rigfuse."""

__version__ = "0.1.0"
