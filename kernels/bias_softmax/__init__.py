"""Softmax of scores plus a scaled and clamped bias, in one pass over each row."""
