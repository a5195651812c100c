"""Experiments by name. Each is a function that returns a filled dataclass, most of them another one with a change."""

from ..command_line import nearest
from ..config import Experiment
from .cmt_aqr import configs as detection
from .completion import configs as completion

EXPERIMENTS = {**completion.EXPERIMENTS, **detection.EXPERIMENTS}


def experiment(name: str) -> Experiment:
    """The experiment of this name, filled anew. ValueError with the nearest name for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no config {name!r}{nearest(name, EXPERIMENTS)}")
    made = EXPERIMENTS[name]()
    made.name = name
    return made
