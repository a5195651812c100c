"""CMT with attention-bias query routing (AQR): 3-D detection from cameras and LiDAR."""
