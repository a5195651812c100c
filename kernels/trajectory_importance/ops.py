"""Registration of the Triton backend with torch."""

from ..runtime.library import register


def _forward(points, valid, height, width, sigma):
    from .triton import launch_forward

    return launch_forward(points, valid, height, width, sigma)


def _fake_forward(points, valid, height, width, sigma):
    return points.new_empty((points.shape[0], height, width)).float()


trajectory_importance = register(
    "trajectory_importance(Tensor points, Tensor valid, SymInt height, SymInt width, float sigma) -> Tensor",
    _forward,
    _fake_forward,
)
