"""A generated world in nuScenes' format, with exact depth, and the same renderer over real nuScenes geometry."""

from ...kernels.runtime.extras import require

require("train", "shapely")  # before what imports it

from .check import check_world  # noqa: E402
from .over import draw_over  # noqa: E402
from .sensors import read_depth  # noqa: E402
from .summary import describe  # noqa: E402
from .writer import WorldSettings, make_world  # noqa: E402

__all__ = ["WorldSettings", "check_world", "describe", "draw_over", "make_world", "read_depth"]
