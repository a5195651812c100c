"""Warp of source maps into target maps over several depth hypotheses, and of bird's-eye views over one plane."""
