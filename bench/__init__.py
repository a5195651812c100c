"""Measures kernels and modules."""
