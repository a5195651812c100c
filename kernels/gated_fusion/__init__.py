"""Gated fusion of completed features into the original ones, in one pass over memory."""
