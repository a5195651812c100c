"""Experiments by name. Each is a function that returns a filled dataclass, most of them another one with a change."""

from importlib import import_module

from ..command_line import nearest
from ..config import Experiment

# The folders here; `configs.EXPERIMENTS` in each has its experiments by name.
SYSTEMS = ("completion", "cmt_aqr", "depth", "map_qformer", "sparse_drive", "static_bev")
EXPERIMENTS = {
    name: make for system in SYSTEMS for name, make in import_module(f".{system}.configs", __name__).EXPERIMENTS.items()
}


def experiment(name: str) -> Experiment:
    """Returns the experiment of this name, filled anew. ValueError with the nearest name for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no config {name!r}{nearest(name, EXPERIMENTS)}")
    made = EXPERIMENTS[name]()
    made.name = name
    return made
