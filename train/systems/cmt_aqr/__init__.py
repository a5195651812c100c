"""The camera + LiDAR detector with attention-bias query routing."""
