"""A generated world in nuScenes' format, with exact depth, and the same renderer over real nuScenes geometry."""

from .check import check_world
from .over import draw_over
from .sensors import read_depth
from .summary import describe
from .writer import WorldSettings, make_world

__all__ = ["WorldSettings", "check_world", "describe", "draw_over", "make_world", "read_depth"]
