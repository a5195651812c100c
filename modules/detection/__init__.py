"""What detectors share: batches, matching and losses, denoising queries."""
