"""Data: nuScenes through its devkit, and a built-in drive that needs no files."""

from pathlib import Path

from .drive import builtin_drives
from .files import BadFile
from .moments import Box, Drive, Moment
from .nuscenes import nuscenes_drives

__all__ = ["BadFile", "Box", "Drive", "Moment", "builtin_drives", "nuscenes_drives", "open_drives"]


def open_drives(data: str | Path | None, version: str | None = None, split: str | None = None) -> list[Drive]:
    """The drives of a nuScenes root, or the built-in ones for None. See `nuscenes_drives` and `builtin_drives`."""
    if data is not None:
        return nuscenes_drives(data, version, split)
    if version is not None or split is not None:
        raise ValueError("open_drives: the built-in drives have no version or split; give a nuScenes root")
    return builtin_drives()
