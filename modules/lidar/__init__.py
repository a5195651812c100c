"""The LiDAR branch in plain PyTorch: voxels, sparse convolution, SECOND."""
