"""Completion of missing cameras."""
