"""Evaluation: how well a trained network does what it is for."""
