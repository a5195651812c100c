"""Attention-bias query routing (AQR): each query weighs the modalities at its own place.

Modality 0 is the camera, 1 the LiDAR. The maps of the decoder's memory are the BEV map, then the V camera maps.
`GENERATIONS` of the same idea: v3 biases the cross-attention (`AttentionBiasGenerator`); v1 and v2 change the tokens
themselves (`render_weights`, `modulate`), v2 a tenth as much; "none" is the detector without routing.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ...kernels import TokenMap, multi_depth_warp, window_attention
from ..attention import check_heads
from ..maps_layout import MapLayout
from ..operations import OperationModule
from ..settings import Count, Positive
from .transformer import Routing

Generation = Literal["none", "v1", "v2", "v3"]
GENERATIONS = get_args(Generation)


@dataclass
class AQRConfig:
    """Settings of the routing."""

    generation: Generation = "v3"
    evidence: Literal["window", "point"] = "window"  # what weights are judged by: attention in windows, or one sample
    channels: Count = 128  # of that attention: it reads every token of every map, so its width is most of its cost
    heads: Count = 4  # of that attention, of 16 to 128 channels each
    feedforward: Count = 1024  # hidden channels of the network after it
    window_sizes: tuple[Count, Count] = (8, 5)  # sides in cells: camera, LiDAR
    bias_scale: Positive = 2.5  # where it starts
    min_scale: Positive = 0.5  # limits of the scale
    max_scale: Positive = 5.0
    learnable_scale: bool = True  # False keeps the scale: a buffer instead of a parameter, of the same name
    use_local_bias: bool = True  # False biases the whole of every map of a modality, for every query, wherever it is

    def validate(self) -> None:
        """ValueError where the scale starts outside its limits."""
        if not self.min_scale <= self.bias_scale <= self.max_scale:
            raise ValueError(f"bias_scale is {self.bias_scale}, needs {self.min_scale} to {self.max_scale}")

    def build(
        self, channels: int, layout: MapLayout
    ) -> tuple["AQRWeightGenerator | PointWeightGenerator | None", "AttentionBiasGenerator | None"]:
        """Builds the two generators for maps of C channels; None for generation "none"."""
        if self.generation == "none":
            return None, None
        if self.evidence == "point":
            weights = PointWeightGenerator(channels, hidden=channels)
        else:
            maps = token_maps(layout, self.window_sizes)
            sizes = dict(width=self.channels, heads=self.heads, feedforward=self.feedforward)
            weights = AQRWeightGenerator(channels, maps, **sizes)
        return weights, AttentionBiasGenerator(layout, self)


def token_maps(layout: MapLayout, windows: tuple[int, int]) -> tuple[TokenMap, ...]:
    """The BEV map, then the cameras', with windows of these sides in cells: camera, LiDAR."""
    return (TokenMap(*layout.bev_shape, windows[1]), *(TokenMap(*layout.view_shape, windows[0]),) * layout.cameras)


class AQRWeightGenerator(OperationModule):
    """Gives each query one weight per modality, from what the query is and what the maps hold round its place.

    One layer of a transformer whose queries attend only to the tokens in their windows on the BEV map and on the camera
    maps (`window_attention`), with the decoder's position encodings and a learned vector for each modality on keys and
    values; residual, norm, feed-forward network, residual, norm. A query that has no token in any window goes by its
    place alone. The last layer starts at zero: every weight is 0, so training starts from the detector without routing.

    Args:
        channels: C of queries and tokens.
        maps: in the order of their tokens, see `token_maps`; the first is the LiDAR's, the others the camera's.
        width: channels of the attention.
        heads: attention heads, of 16 to 128 channels each.
        feedforward: hidden channels.
    """

    def __init__(
        self,
        channels: int,
        maps: tuple[TokenMap, ...],
        *,
        width: int = 128,
        heads: int = 4,
        feedforward: int = 1024,
    ):
        super().__init__()
        check_heads("AQRWeightGenerator: heads", heads, width)
        self.maps, self.heads = tuple(maps), heads
        self.query, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.key, self.value = nn.Linear(channels, width), nn.Linear(channels, width)
        self.modality = nn.Parameter(torch.randn(2, 2, width) * 0.02)  # key and value of camera and LiDAR
        self.feedforward = nn.Sequential(nn.Linear(channels, feedforward), nn.ReLU(), nn.Linear(feedforward, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.last = _zero_linear(channels, 2)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Weighs the modalities: a negative weight suppresses one. All floating inputs but `cells` get gradients.

        Args:
            query: (B, N, C), the encodings of the queries' places.
            key: (B, L, C), the tokens plus the encodings of their places.
            value: (B, L, C), the tokens.
            cells: (B, N, maps, 2) float32, see `MapLayout.cells`.

        Returns:
            (B, N, 2) of camera and LiDAR, in [−1, 1].
        """
        key, value = self._of_modalities(self.key(key), 0), self._of_modalities(self.value(value), 1)
        parts = (x.unflatten(-1, (self.heads, -1)) for x in (self.query(query), key, value))
        read = window_attention(*parts, cells, maps=self.maps, backend=self.backend)
        query = self.norms[0](query + self.out(read.flatten(2)))
        query = self.norms[1](query + self.feedforward(query))
        return torch.tanh(self.last(query))

    def _of_modalities(self, tokens, kind):
        """Adds to projected tokens (B, L, width) the vectors of their modalities: before the projection the sum would
        be kept for backward."""
        bev = self.maps[0].height * self.maps[0].width
        camera, lidar = self.modality[:, kind].to(tokens.dtype)
        of_bev, of_views = tokens.tensor_split([bev], dim=1)
        return torch.cat([of_bev + lidar, of_views + camera], dim=1)


class PointWeightGenerator(nn.Module):
    """Gives each query one weight per modality, from what the query is and what the modality's map holds at its place.

    The last layer starts at zero: every weight is 0, so training starts from the detector without routing.

    Args:
        channels: C of queries and maps.
        hidden: width of the hidden layer.
        modalities: M.
    """

    def __init__(self, channels: int, *, hidden: int, modalities: int = 2):
        super().__init__()
        self.hidden = nn.Linear(channels + modalities * (channels + 1), hidden)
        self.last = _zero_linear(hidden, modalities)

    def forward(self, query: torch.Tensor, local: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Weighs the modalities: a negative weight suppresses one.

        Args:
            query: (B, N, C); gets gradients.
            local, seen: (B, N, M, C), which gets gradients, and (B, N, M) bool, as from `gather_local`.

        Returns:
            (B, N, M) in [−1, 1].
        """
        present = torch.where(seen[..., None], local, 0)
        hidden = torch.relu(self.hidden(torch.cat([query, present.flatten(2), seen.to(query.dtype)], dim=-1)))
        return torch.tanh(self.last(hidden))


def _zero_linear(channels, out):
    layer = nn.Linear(channels, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def gather_local(
    bev: torch.Tensor, images: torch.Tensor, cells: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples each modality's maps at the queries' places: bilinear, the border cells continued to the map's edge.

    Args:
        bev: (B, C, H, W). Gets gradients.
        images: (B, V, C, h, w) in `bev`'s dtype. Gets gradients.
        cells: (B, N, 1 + V, 2) float32, from `MapLayout.cells`.
        backend: backend of `multi_depth_warp`.

    Returns:
        local: (B, N, 2, C), the mean over the cameras that see the place, and the BEV map's; zeros where none does.
        seen: (B, N, 2) bool.

    Raises:
        ValueError: the shape of `cells` does not fit the maps.
    """
    maps = 1 + images.shape[1]
    if cells.ndim != 4 or len(cells) != len(bev) or cells.shape[2:] != (maps, 2):
        raise ValueError(f"cells has shape {tuple(cells.shape)}, needs ({len(bev)}, N, {maps}, 2)")
    on_map = cells.isfinite().all(-1)  # (B, N, 1 + V)
    views = _sample(images.flatten(0, 1), cells[:, :, 1:].transpose(1, 2).flatten(0, 1), backend)
    views = views.unflatten(0, images.shape[:2]).sum(1)  # (B, N, C)
    count = on_map[:, :, 1:].sum(-1, keepdim=True)
    local = torch.stack([views / count.clamp(min=1), _sample(bev, cells[:, :, 0], backend)], dim=2)
    return local, torch.stack([count[..., 0] > 0, on_map[:, :, 0]], dim=-1)


def _sample(maps, cells, backend):
    """maps (S, C, H, W) at cells (S, N, 2) → (S, N, C), zeros where a cell is NaN."""
    # As a warp by offsets alone: its backward gathers, where those of grid_sample and of an index add atomically.
    height, width = maps.shape[-2:]
    last = cells.new_tensor([width - 1, height - 1])
    offsets = torch.minimum(cells.clamp(min=0), last)[:, None, None]  # (S, 1, 1, N, 2), NaN stays NaN
    nowhere = cells.new_zeros(len(maps), 3, 4)
    nowhere[:, 2, 2] = 1  # (0, 0, depth)
    size = (1, cells.shape[1])
    depth = cells.new_ones(1)
    return multi_depth_warp(maps, nowhere, depth, offsets=offsets, output_size=size, backend=backend)[0][:, :, 0].mT


class AttentionBiasGenerator(nn.Module):
    """Turns the weights of the modalities into the routing of the decoder's cross-attention (v3).

    The bias is clamp(bias_scale, min_scale, max_scale) · weight, limited to ±min(5, max_scale), in a square window of
    cells round the query's reference point on each map, and 0 elsewhere. The design documents' `fp16` has no
    counterpart: the bias is never a tensor, `window_bias_attention` forms it where it is used.

    Args:
        layout: of the maps.
        config: see `AQRConfig`; None = its defaults.

    Attributes:
        bias_scale: scalar.
        maps: the BEV map, then the cameras', as `window_bias_attention` takes them.
    """

    def __init__(self, layout: MapLayout, config: AQRConfig | None = None):
        super().__init__()
        config = config or AQRConfig()
        if len(config.window_sizes) != 2 or min(config.window_sizes) < 1:
            got = f"window_sizes is {tuple(config.window_sizes)}"
            raise ValueError(f"{got}, needs two sides (camera, LiDAR) of at least 1 cell")
        if not 0 <= config.min_scale <= config.bias_scale <= config.max_scale:
            needed = f"0 ≤ min_scale ({config.min_scale}) ≤ bias_scale ≤ max_scale ({config.max_scale})"
            raise ValueError(f"bias_scale is {config.bias_scale}, needs {needed}")
        self.min_scale, self.max_scale = config.min_scale, config.max_scale
        self.use_local_bias, self.cameras = config.use_local_bias, layout.cameras
        windows = config.window_sizes
        if not config.use_local_bias:
            windows = (_whole(layout.view_shape), _whole(layout.bev_shape))
        self.maps = token_maps(layout, windows)
        scale = torch.tensor(float(config.bias_scale))
        if config.learnable_scale:
            self.bias_scale = nn.Parameter(scale)
        else:
            self.register_buffer("bias_scale", scale)

    def per_map(self, weights: torch.Tensor) -> torch.Tensor:
        """Spreads weights (B, N, 2) of camera and LiDAR over the maps, (B, N, 1 + V): the LiDAR's for the BEV map, then
        the camera's."""
        camera, lidar = weights.split(1, dim=-1)
        return torch.cat([lidar, camera.expand(-1, -1, self.cameras)], dim=-1)

    def forward(self, weights: torch.Tensor, cells: torch.Tensor) -> Routing:
        """Makes the routing from the weights (B, N, 2) of camera and LiDAR, which get gradients, and the queries' cells
        (B, N, 1 + V, 2), see `MapLayout.cells`."""
        if not self.use_local_bias:
            cells = torch.zeros_like(cells)  # the windows reach over the whole map from any of its cells
        return Routing(self.maps, cells, self.per_map(weights), self.bias_scale, self.min_scale, self.max_scale)


def _whole(shape):
    """The side of a window that covers a map of this shape wherever in the map its centre is."""
    return 2 * max(shape)


def render_weights(weights: torch.Tensor, cells: torch.Tensor, maps: tuple[TokenMap, ...]) -> torch.Tensor:
    """Spreads the queries' weights over the tokens: each gets the mean over the queries whose window covers it, 1 where
    none does (v1, v2).

    The windows are those of `window_bias_attention`. Here 1 is neutral: pass 1 + the weights of `AQRWeightGenerator`.
    Denoising queries know the ground truth and must stay out. Without atomics.

    Args:
        weights: (B, N, maps), see `AttentionBiasGenerator.per_map`. Gets gradients.
        cells: (B, N, maps, 2) (x, y), NaN = the query is not on this map.
        maps: in the order of their tokens.

    Returns:
        (B, L) float32 (float64 for float64 weights), L = Σ height · width.

    Raises:
        ValueError: `weights`, `cells` and `maps` do not fit one another.
    """
    if cells.shape != (*weights.shape, 2) or weights.shape[2:] != (len(maps),):
        got = f"weights has shape {tuple(weights.shape)} and cells {tuple(cells.shape)}"
        raise ValueError(f"{got}, need (B, N, {len(maps)}) and (B, N, {len(maps)}, 2)")
    weights = weights if weights.dtype == torch.float64 else weights.float()
    rendered = []
    with torch.autocast(weights.device.type, enabled=False):
        for m, (height, width, window) in enumerate(maps):
            first = torch.floor(cells[:, :, m] + 0.5) - window // 2
            columns = _inside(first[..., 0], width, window).to(weights)
            rows = _inside(first[..., 1], height, window).to(weights)
            # A window is rows times columns, so the sums over the queries are products of two small matrices.
            total = rows.mT @ (weights[:, :, m, None] * columns)  # (B, H, W)
            count = rows.mT @ columns
            rendered.append(torch.where(count > 0, total / count.clamp(min=1), 1).flatten(1))
    return torch.cat(rendered, dim=1)


def _inside(first, size, window):
    """Which of `size` cells a window that begins at `first` (B, N) covers, (B, N, size) bool; NaN covers none."""
    offset = torch.arange(size, dtype=first.dtype, device=first.device) - first[..., None]
    return (offset >= 0) & (offset < window)


def modulate(tokens: torch.Tensor, rendered: torch.Tensor, generation: str) -> torch.Tensor:
    """Weighs tokens (B, L, C) by (B, L): `tokens · weights` in v1, `tokens + tokens · (weights − 1) · 0.1` in v2."""
    if generation not in ("v1", "v2"):
        raise ValueError(f"modulate: generation is {generation!r}, needs 'v1' or 'v2': the others leave tokens alone")
    factor = rendered if generation == "v1" else 1 + (rendered - 1) * 0.1
    return tokens * factor[..., None].to(tokens.dtype)
