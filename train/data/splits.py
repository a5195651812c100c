"""Which scenes of a nuScenes root are for training and which for validation."""

import json
from pathlib import Path
from typing import Protocol

from ..command_line import nearest
from .moments import Drive
from .nuscenes import nuscenes_drives

_USUAL = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}


class DataConfig(Protocol):
    """What the data settings of every task have."""

    root: str
    version: str | None
    train_split: str | None
    val_split: str | None


def split_names(config: DataConfig) -> tuple[str, str]:
    """The names of the training and the validation split: those that are set, else those of the root's splits.json
    (such as world_train and world_val), else those of the version.

    Raises:
        ValueError: nothing says which, or a name is unknown (the nearest is named).
    """
    own, choices, file = _splits(config)
    version = file.parent.name
    ends = [[name for name in own if name.endswith(end)] for end in ("train", "val")]
    usual = [names[0] for names in ends] if all(len(names) == 1 for names in ends) else _USUAL.get(version, (None,) * 2)
    chosen = []
    for field, default in zip(("train_split", "val_split"), usual):
        name = getattr(config, field) or default
        if name is None:
            known = ", ".join(choices)
            raise ValueError(f"{file} does not say which splits to take; set data.{field} to one of {known}")
        if name not in choices:
            raise ValueError(f"data.{field} is {name!r}{nearest(name, choices)}")
        chosen.append(name)
    return tuple(chosen)


def drives_of_splits(config: DataConfig) -> tuple[list[Drive], list[Drive]]:
    """The training scenes and the validation scenes of `config.root`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `nuscenes_drives` and `split_names`; a scene in both splits.
    """
    drives = nuscenes_drives(config.root, config.version)
    choices = _splits(config)[1]
    training, validation = (set(choices[name]) for name in split_names(config))
    if training & validation:
        raise ValueError(f"scenes in both splits: {', '.join(sorted(training & validation)[:3])}")
    return [d for d in drives if d.name in training], [d for d in drives if d.name in validation]


def _splits(config):
    """The root's own splits, all that are known, and the file of the former."""
    from nuscenes.utils.splits import create_splits_scenes

    root = Path(config.root)
    version = config.version or next(path.parent.name for path in root.glob("*/sample_data.json"))
    file = root / version / "splits.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    return own, create_splits_scenes() | own, file
