"""The sparse driving model: detection, tracking, map, motion and planning from cameras."""
