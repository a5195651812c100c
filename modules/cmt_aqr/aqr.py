"""Attention-bias query routing (AQR): each query weighs the modalities at its own place.

Modality 0 is the camera, 1 the LiDAR. The maps of the decoder's memory are the BEV map, then the V camera maps.
`GENERATIONS` of the same idea: v3 biases the cross-attention (`AttentionBiasGenerator`); v1 and v2 change the tokens
themselves (`render_weights`, `modulate`), v2 a tenth as much; "none" is the detector without routing.
"""

import torch
from torch import nn

from ...kernels import TokenMap, multi_depth_warp
from .encodings import POINT_RANGE, bev_cells, camera_cells
from .transformer import Routing

GENERATIONS = ("none", "v1", "v2", "v3")


class AQRWeightGenerator(nn.Module):
    """One weight per query and modality, from what the query is and what each modality's map holds at its place.

    The last layer starts at zero: every weight is 0, so training starts from the detector without routing.

    Args:
        channels: C of queries and maps.
        modalities: M.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: int = 256, modalities: int = 2, hidden: int = 256):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(channels + modalities * (channels + 1), hidden), nn.ReLU(), nn.Linear(hidden, modalities)
        )
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, query: torch.Tensor, local: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """query (B, N, C), local (B, N, M, C) and seen (B, N, M) bool, as from `gather_local` → (B, N, M) in [−1, 1].

        A negative weight suppresses the modality. Gradients: query, local.
        """
        present = torch.where(seen[..., None], local, 0)
        return torch.tanh(self.network(torch.cat([query, present.flatten(2), seen.to(query.dtype)], dim=-1)))


def gather_local(
    bev: torch.Tensor, images: torch.Tensor, centers: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each modality's maps hold at the queries' places: bilinear, the border cells continued to the map's edge.

    Args:
        bev: (B, C, H, W). Gets gradients.
        images: (B, V, C, h, w) in `bev`'s dtype. Gets gradients.
        centers: (B, N, 1 + V, 2) float32, from `AttentionBiasGenerator.centers`.
        backend: backend of `multi_depth_warp`.

    Returns:
        local: (B, N, 2, C), the mean over the cameras that see the place, and the BEV map's; zeros where none does.
        seen: (B, N, 2) bool.

    Raises:
        ValueError: the shape of `centers` does not fit the maps.
    """
    maps = 1 + images.shape[1]
    if centers.ndim != 4 or len(centers) != len(bev) or centers.shape[2:] != (maps, 2):
        raise ValueError(f"centers has shape {tuple(centers.shape)}, needs ({len(bev)}, N, {maps}, 2)")
    on_map = centers.isfinite().all(-1)  # (B, N, 1 + V)
    views = _sample(images.flatten(0, 1), centers[:, :, 1:].transpose(1, 2).flatten(0, 1), backend)
    views = views.unflatten(0, images.shape[:2]).sum(1)  # (B, N, C)
    count = on_map[:, :, 1:].sum(-1, keepdim=True)
    local = torch.stack([views / count.clamp(min=1), _sample(bev, centers[:, :, 0], backend)], dim=2)
    return local, torch.stack([count[..., 0] > 0, on_map[:, :, 0]], dim=-1)


def _sample(maps, centers, backend):
    """maps (S, C, H, W), centers (S, N, 2) → (S, N, C), zeros at NaN."""
    # As a warp by offsets alone: its backward gathers, where those of grid_sample and of an index add atomically.
    height, width = maps.shape[-2:]
    last = centers.new_tensor([width - 1, height - 1])
    offsets = torch.minimum(centers.clamp(min=0), last)[:, None, None]  # (S, 1, 1, N, 2), NaN stays NaN
    nowhere = centers.new_zeros(len(maps), 3, 4)
    nowhere[:, 2, 2] = 1  # (0, 0, depth)
    size = (1, centers.shape[1])
    depth = centers.new_ones(1)
    return multi_depth_warp(maps, nowhere, depth, offsets=offsets, output_size=size, backend=backend)[0][:, :, 0].mT


class AttentionBiasGenerator(nn.Module):
    """Turns the weights of the modalities into the routing of the decoder's cross-attention (v3).

    The bias is clamp(bias_scale, min_scale, max_scale) · weight, limited to ±min(5, max_scale), in a square window of
    cells round the query's reference point on each map, and 0 elsewhere. The design documents' `fp16` has no
    counterpart: the bias is never a tensor, `window_bias_attention` forms it where it is used.

    Args:
        bev_feature_shape: (H, W) of the BEV map, which spans `point_range`.
        pers_feature_shape: (V, H, W) of the camera maps.
        window_sizes: side of the window, in cells: camera, LiDAR.
        bias_scale: its start.
        min_scale, max_scale: its limits.
        learnable_scale: False keeps `bias_scale` as it is: a buffer instead of a parameter, of the same name.
        use_local_bias: False biases the whole of every map of a modality, for every query, wherever it is.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres, ego frame.
        stride: image pixels per cell of the camera maps.

    Attributes:
        bias_scale: scalar.
        maps: the BEV map, then the cameras', as `window_bias_attention` takes them.
    """

    def __init__(
        self,
        bev_feature_shape: tuple[int, int] = (128, 128),
        pers_feature_shape: tuple[int, int, int] = (6, 20, 50),
        *,
        window_sizes: tuple[int, int] = (8, 5),
        bias_scale: float = 2.5,
        min_scale: float = 0.5,
        max_scale: float = 5.0,
        learnable_scale: bool = True,
        use_local_bias: bool = True,
        point_range: tuple[float, ...] = POINT_RANGE,
        stride: int = 16,
    ):
        super().__init__()
        if len(window_sizes) != 2 or min(window_sizes) < 1:
            raise ValueError(
                f"window_sizes is {tuple(window_sizes)}, needs two sides (camera, LiDAR) of at least 1 cell"
            )
        if not 0 <= min_scale <= bias_scale <= max_scale:
            needed = f"0 ≤ min_scale ({min_scale}) ≤ bias_scale ≤ max_scale ({max_scale})"
            raise ValueError(f"bias_scale is {bias_scale}, needs {needed}")
        self.bev_shape, self.camera_shape = tuple(bev_feature_shape), tuple(pers_feature_shape[1:])
        self.cameras, self.point_range, self.stride = pers_feature_shape[0], tuple(point_range), stride
        self.min_scale, self.max_scale, self.use_local_bias = min_scale, max_scale, use_local_bias
        camera_window, lidar_window = (
            window_sizes if use_local_bias else map(_whole, (self.camera_shape, self.bev_shape))
        )
        views = (TokenMap(*self.camera_shape, camera_window),) * self.cameras
        self.maps = (TokenMap(*self.bev_shape, lidar_window), *views)
        scale = torch.tensor(float(bias_scale))
        if learnable_scale:
            self.bias_scale = nn.Parameter(scale)
        else:
            self.register_buffer("bias_scale", scale)

    def centers(self, reference: torch.Tensor, image_T_ego: torch.Tensor) -> torch.Tensor:
        """Where the reference points are on each map.

        Args:
            reference: (B, N, 3) metres, ego frame. Gets no gradient.
            image_T_ego: (B, V, 3 or 4, 4) float64, see `RigFrame`.

        Returns:
            (B, N, 1 + V, 2) float32 cells (x, y), the BEV map first; NaN where a point is not on the map: beside it, at
            most 0.1 m in front of the camera, or not finite.

        Raises:
            ValueError: a shape does not fit.
            TypeError: `image_T_ego` is not float64.
        """
        views = camera_cells(reference, image_T_ego, self.camera_shape, self.stride)
        if views.shape[2] != self.cameras:
            raise ValueError(f"image_T_ego has {views.shape[2]} cameras, needs {self.cameras}")
        return torch.cat([bev_cells(reference, self.bev_shape, self.point_range)[:, :, None], views], dim=2)

    def per_map(self, weights: torch.Tensor) -> torch.Tensor:
        """weights (B, N, 2) of camera and LiDAR → (B, N, 1 + V): the LiDAR's for the BEV map, then the camera's."""
        camera, lidar = weights.split(1, dim=-1)
        return torch.cat([lidar, camera.expand(-1, -1, self.cameras)], dim=-1)

    def forward(self, weights: torch.Tensor, centers: torch.Tensor) -> Routing:
        """weights (B, N, 2) of camera and LiDAR, which get gradients, and `centers` (B, N, 1 + V, 2) → the routing."""
        if not self.use_local_bias:
            centers = torch.zeros_like(centers)  # the windows reach over the whole map from any of its cells
        return Routing(self.maps, centers, self.per_map(weights), self.bias_scale, self.min_scale, self.max_scale)


def _whole(shape):
    """The side of a window that covers a map of this shape from any of its cells."""
    return 2 * max(shape)


def render_weights(weights: torch.Tensor, centers: torch.Tensor, maps: tuple[TokenMap, ...]) -> torch.Tensor:
    """The weight of each token: the mean over the queries whose window covers it, 1 where none does (v1, v2).

    The windows are those of `window_bias_attention`. Here 1 is neutral: pass 1 + the weights of `AQRWeightGenerator`.
    Denoising queries know the ground truth and must stay out. Without atomics.

    Args:
        weights: (B, N, maps), see `AttentionBiasGenerator.per_map`. Gets gradients.
        centers: (B, N, maps, 2) cells (x, y), NaN = the query is not on this map.
        maps: in the order of their tokens.

    Returns:
        (B, L) float32 (float64 for float64 weights), L = Σ height · width.

    Raises:
        ValueError: `weights`, `centers` and `maps` do not fit one another.
    """
    if centers.shape != (*weights.shape, 2) or weights.shape[2:] != (len(maps),):
        got = f"weights has shape {tuple(weights.shape)} and centers {tuple(centers.shape)}"
        raise ValueError(f"{got}, need (B, N, {len(maps)}) and (B, N, {len(maps)}, 2)")
    weights = weights if weights.dtype == torch.float64 else weights.float()
    rendered = []
    with torch.autocast(weights.device.type, enabled=False):
        for m, (height, width, window) in enumerate(maps):
            first = torch.floor(centers[:, :, m] + 0.5) - window // 2
            columns = _inside(first[..., 0], width, window).to(weights)
            rows = _inside(first[..., 1], height, window).to(weights)
            # A window is rows times columns, so the sums over the queries are products of two small matrices.
            total = rows.mT @ (weights[:, :, m, None] * columns)  # (B, H, W)
            count = rows.mT @ columns
            rendered.append(torch.where(count > 0, total / count.clamp(min=1), 1).flatten(1))
    return torch.cat(rendered, dim=1)


def _inside(first, size, window):
    """(B, N, size) bool, in floating point: NaN is never inside."""
    offset = torch.arange(size, dtype=first.dtype, device=first.device) - first[..., None]
    return (offset >= 0) & (offset < window)


def modulate(tokens: torch.Tensor, rendered: torch.Tensor, generation: str) -> torch.Tensor:
    """tokens (B, L, C) times their weights (B, L) in v1; `tokens + tokens · (weights − 1) · 0.1` in v2."""
    if generation not in ("v1", "v2"):
        raise ValueError(f"modulate: generation is {generation!r}, needs 'v1' or 'v2': the others leave tokens alone")
    factor = rendered if generation == "v1" else 1 + (rendered - 1) * 0.1
    return tokens * factor[..., None].to(tokens.dtype)
