"""Depth as an experiment: trains the shared backbone."""
