"""Which scenes of a nuScenes root are for training and which for validation."""

from typing import Protocol

from ..command_line import nearest
from .moments import Drive
from .nuscenes import known_splits, nuscenes_drives, own_splits, tables_folder

# Version → (training, validation). None = there is none: those data are for a submission.
_USUAL = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val"), "v1.0-test": (None, "test")}


class DataConfig(Protocol):
    """What the data settings of every task have."""

    root: str
    version: str | None
    train_split: str | None
    val_split: str | None


def need_root(config: DataConfig, task: str) -> None:
    """Raises ValueError where no root is set, and says how to get one; `task` begins with what needs it and a verb."""
    if not config.root:
        make = "python train/tools/make_world.py --out FOLDER, then --data FOLDER"
        raise ValueError(f"data.root is empty, {task} a folder in nuScenes format; make a world: {make}")


def split_names(config: DataConfig) -> tuple[str | None, str]:
    """The names of the training and the validation split: those that are set, else those of the root's splits.json
    (such as world_train and world_val), else those of the version.

    Returns:
        (training, validation). The first is None for version v1.0-test, which is only for submissions, where it is not
        set.

    Raises:
        FileNotFoundError, ImportError: see `nuscenes_drives`.
        ValueError: nothing says which, or a name is unknown (the nearest is named).
    """
    folder = tables_folder(config.root, config.version)
    own, choices = own_splits(folder), known_splits(folder)
    ends = [[name for name in own if name.endswith(end)] for end in ("train", "val")]
    usual = _USUAL.get(folder.name)
    if all(len(names) == 1 for names in ends):
        usual = [names[0] for names in ends]
    chosen = []
    for field, default in zip(("train_split", "val_split"), usual or (None, None)):
        name = getattr(config, field) or default
        if name is None and usual is None:
            known = ", ".join(choices)
            raise ValueError(f"{folder} does not say which splits to take; set data.{field} to one of {known}")
        if name is not None and name not in choices:
            raise ValueError(f"data.{field} is {name!r}{nearest(name, choices)}")
        chosen.append(name)
    return tuple(chosen)


def drives_of_splits(config: DataConfig) -> tuple[list[Drive], list[Drive]]:
    """The training scenes (none where there is no such split) and the validation scenes of `config.root`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `nuscenes_drives` and `split_names`; a scene in both splits.
    """
    names = split_names(config)
    choices = known_splits(tables_folder(config.root, config.version))
    training, validation = (set(choices[name] if name else ()) for name in names)
    if training & validation:
        raise ValueError(f"scenes in both splits: {', '.join(sorted(training & validation)[:3])}")
    drives = nuscenes_drives(config.root, config.version)
    return [d for d in drives if d.name in training], [d for d in drives if d.name in validation]
