"""The sparse driving head: detection, tracking, map, motion and planning on camera features (SparseDrive)."""
