"""Fused operations for a camera rig. Importing this does not import triton."""

# In the repository's root this folder is also a package named "kernels", which transformers looks for and imports.
# Under that name it has to stay empty, or the operations would be registered twice.
if __name__ != "kernels":
    from .bias_softmax.api import bias_softmax
    from .cross_camera_attention.api import cross_camera_attention
    from .deformable_aggregation.api import deformable_aggregation
    from .gated_fusion.api import gated_fusion
    from .multi_depth_warp.api import bev_warp, multi_depth_warp
    from .runtime.backends import BackendError
    from .runtime.token_maps import TokenMap
    from .trajectory_importance.api import trajectory_importance
    from .window_attention.api import window_attention
    from .window_bias_attention.api import window_bias_attention

__all__ = [
    "BackendError",
    "TokenMap",
    "bev_warp",
    "bias_softmax",
    "cross_camera_attention",
    "deformable_aggregation",
    "gated_fusion",
    "multi_depth_warp",
    "trajectory_importance",
    "window_attention",
    "window_bias_attention",
]
