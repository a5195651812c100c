"""What can be measured: a comparison, one operation, a training step of the detector."""
