"""Samples of many cameras and scales at the keypoints of anchors, summed with grouped weights."""
