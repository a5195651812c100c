"""The networks of a camera rig, built on the fused operations."""
