"""Opens a run that was trained: its settings, its network with its weights, its log."""

import json
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Experiment, update
from .systems import experiment


@dataclass(frozen=True, eq=False)
class SavedRun:
    """One checkpoint of a run.

    Args:
        path: of the checkpoint.
        state: what it holds, on the CPU.
        settings: those it was trained with.
    """

    path: Path
    state: dict
    settings: Experiment

    @property
    def step(self) -> int:
        return self.state["counters"]["step"]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.path.resolve().parent.parent

    def build_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network with the checkpoint's weights; CheckpointError where these do not fit it."""
        model = without_weight_files(self.settings).build_model().to(device)
        checkpoint.load_weights(model, self.state["model"], self.path)
        return model


def open_run(source: str | Path, data: str | None = None) -> SavedRun:
    """Reads a checkpoint, or of the folder of a run the best one, else the last.

    Args:
        source: a checkpoint or the folder of a run.
        data: a folder in nuScenes format instead of the one that the run was trained on.

    Raises:
        CheckpointError: it cannot be used.
        ValueError: its settings are those of no experiment here.
    """
    path = Path(source)
    if path.is_dir():
        best = path / "checkpoints" / "best.pt"
        path = best if best.exists() else best.with_name("last.pt")
    state = checkpoint.load(path)
    settings = settings_of(state["config"])
    if data:
        settings.data.root = data
    return SavedRun(path, state, settings)


def settings_of(config: dict) -> Experiment:
    """The settings that a checkpoint holds as plain values."""
    return update(experiment(config["name"]), config)


def read_log(folder: str | Path) -> list[dict]:
    """The records of a run, oldest first; FileNotFoundError where `folder` is not that of a run."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_weight_files(settings: Any) -> Any:
    """A copy of the settings that names no file of pretrained weights: a checkpoint replaces them, and they may be
    gone."""
    settings = deepcopy(settings)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            setattr(settings, field.name, without_weight_files(value))
        elif field.name == "weights":
            setattr(settings, field.name, None)
    return settings
