"""Measures the operations and the networks: `python bench/run.py --compare v1 v2`."""
