"""Depth of every cell of the feature maps: what the shared backbone can be trained by."""
