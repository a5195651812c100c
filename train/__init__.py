"""Data, training and evaluation."""

from ..kernels.runtime.extras import require

require("train", "matplotlib", "PIL", "rich", "scipy", "transformers")  # shapely is asked for by what needs it
