"""Attention with a learnable bias in a window round each query's reference points, neither scores nor bias stored."""
