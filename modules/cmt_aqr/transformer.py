"""The decoder: queries attend to one another and to the tokens of every map, with or without routing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...kernels import TokenMap, window_bias_attention
from ...kernels.runtime.nvtx import annotate
from ..attention import check_heads
from ..operations import OperationModule
from ..settings import Count, Share

MAX_BIAS = 5.0  # of any attention bias, both ways


@dataclass
class DecoderConfig:
    """Settings of the decoder."""

    layers: Count = 6  # each with its own weights; the final norm is shared
    heads: Count = 8  # attention heads, of 16 to 128 channels each
    feedforward: Count = 1024  # hidden channels of the feed-forward networks
    dropout: Share = 0.1  # in training, of what is added
    feedforward_dropout: Share | None = None  # the same inside the feed-forward networks; None = dropout
    checkpoint: bool = False  # keep only each layer's inputs for backward and compute the rest again; the same results


@dataclass(frozen=True, eq=False)
class Routing:
    """Says where on each map, and how much, the queries' attention is drawn or turned away (`window_bias_attention`).

    Args:
        maps: the maps in the order of the memory's tokens.
        centers: (B, N, maps, 2) float32 reference points (x, y) in cells, NaN = not on this map.
        weights: (B, N, maps) in [−1, 1]; below 0 turns away.
        bias_scale: () float32.
        min_scale, max_scale: limits of `bias_scale`. The bias itself is clamped to ±min(5, max_scale).
    """

    maps: tuple[TokenMap, ...]
    centers: torch.Tensor
    weights: torch.Tensor
    bias_scale: torch.Tensor
    min_scale: float = 0.5
    max_scale: float = 5.0

    def attend(self, query, key, value, backend=None):
        """Attends with this routing: query (B, N, heads, dim), key and value (B, L, heads, dim) → like query."""
        return window_bias_attention(
            query,
            key,
            value,
            self.centers,
            self.weights,
            self.bias_scale,
            maps=self.maps,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
            max_bias=min(MAX_BIAS, self.max_scale),
            backend=backend,
        )


class Attention(OperationModule):
    """Multi-head attention (Vaswani et al. 2017), plain or with routing."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    @torch.no_grad()
    def compare(self, sharpness: float) -> None:
        """Makes what is alike attend: each head compares channels of its own, queries projected as keys are and
        `sharpness` times as far."""
        width = len(self.key.weight) // self.heads
        turns = [nn.init.orthogonal_(torch.empty(width, width)) for _ in range(self.heads)]
        self.key.weight.copy_(torch.block_diag(*turns))
        self.query.weight.copy_(sharpness * self.key.weight)
        self.query.bias.zero_()
        self.key.bias.zero_()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        """Attends: query (B, N, C), key and value (B, L, C) → (B, N, C); with a `mask` (N, L) bool, True = may attend,
        with a routing, or with neither."""
        projected = self.query(query), self.key(key), self.value(value)
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in projected)
        if routing is not None:
            attended = routing.attend(query, key, value, self.backend)
        else:
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        return self.out(attended.flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward network, each added and then normalised (DETR, Carion et al. 2020).

    Dropout is on what is added and inside the feed-forward network, not on the attention's probabilities.
    """

    def __init__(self, channels: int, config: DecoderConfig):
        super().__init__()
        self.self_attention = Attention(channels, config.heads)
        self.cross_attention = Attention(channels, config.heads)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, config.feedforward),
            nn.ReLU(),
            nn.Dropout(config.dropout if config.feedforward_dropout is None else config.feedforward_dropout),
            nn.Linear(config.feedforward, channels),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, content, query_pos, key, value, self_mask, routing):
        """Updates the content (B, N, C) of the queries; the other arguments as in `QueryDecoder.forward`."""
        with annotate("query_decoder.self_attention"):
            place = content + query_pos
            content = self.norms[0](content + self.dropout(self.self_attention(place, place, content, mask=self_mask)))
        with annotate("query_decoder.cross_attention"):
            attended = self.cross_attention(content + query_pos, key, value, routing=routing)
            content = self.norms[1](content + self.dropout(attended))
        with annotate("query_decoder.feedforward"):
            return self.norms[2](content + self.dropout(self.feedforward(content)))


class QueryDecoder(OperationModule):
    """The decoder of CMT (Yan et al. 2023), whose queries start empty and are filled from all maps at once.

    The cross-attention is `window_bias_attention` with a routing, scaled_dot_product_attention without. The latter's
    gradients on CUDA, those of the self-attention too, repeat bit for bit only under
    `torch.use_deterministic_algorithms(True)`.

    Args:
        channels: C of queries and tokens.
        config: see `DecoderConfig`; None = its defaults.
        nearness: above 0, every query begins with attention to its own place, where encodings tell places apart
            (`CoordinateEncoding` with `heads`): queries are projected as keys are, so many times as far. From a random
            start they attend to all tokens alike and have to learn first to read their own surroundings. About 3.
        backend: of `window_bias_attention`.
    """

    def __init__(
        self,
        channels: int,
        config: DecoderConfig | None = None,
        *,
        nearness: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        config = config or DecoderConfig()
        check_heads("QueryDecoder: heads", config.heads, channels, smallest=8)  # routing itself needs 16
        if config.layers < 1:
            raise ValueError(f"QueryDecoder: layers is {config.layers}, needs at least 1")
        self.channels, self.checkpoint = channels, config.checkpoint
        self.layers = nn.ModuleList(DecoderLayer(channels, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(channels)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.layers if nearness else ():
            layer.cross_attention.compare(nearness)
        self.backend = backend

    def forward(
        self,
        query_pos: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        routing: Routing | None = None,
        self_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fills the queries. All floating inputs get gradients, but the routing's centres.

        Args:
            query_pos: (B, N, C), added to the queries and keys of self-attention and to the queries of cross-attention.
            key: (B, L, C), the tokens plus the encodings of their places.
            value: (B, L, C), the tokens.
            routing: None = plain cross-attention.
            self_mask: (N, N) bool, True = the query of this row may attend to that of this column, at least one in a
                row; None = all.

        Returns:
            (layers, B, N, C): the output of every layer, normalised.

        Raises:
            ValueError: a shape does not fit.
            TypeError: `self_mask` is not bool.
        """
        self._validate(query_pos, key, value, self_mask)
        content, outputs = torch.zeros_like(query_pos), []
        for layer in self.layers:
            arguments = (content, query_pos, key, value, self_mask, routing)
            if self.checkpoint:
                content = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                content = layer(*arguments)
            outputs.append(self.norm(content))
        return torch.stack(outputs)

    def _validate(self, query_pos, key, value, self_mask):
        for name, tensor in dict(query_pos=query_pos, key=key).items():
            if tensor.ndim != 3 or tensor.shape[-1] != self.channels or len(tensor) != len(query_pos):
                needed = f"({len(query_pos)}, {'N' if name == 'query_pos' else 'L'}, {self.channels})"
                raise ValueError(f"QueryDecoder: {name} has shape {tuple(tensor.shape)}, needs {needed}")
        if value.shape != key.shape:
            raise ValueError(f"QueryDecoder: value has shape {tuple(value.shape)}, needs {tuple(key.shape)}")
        if self_mask is None:
            return
        square = (query_pos.shape[1],) * 2
        if self_mask.shape != square:
            raise ValueError(f"QueryDecoder: self_mask has shape {tuple(self_mask.shape)}, needs {square}")
        if self_mask.dtype != torch.bool:
            raise TypeError(f"QueryDecoder: self_mask is {str(self_mask.dtype).removeprefix('torch.')}, needs bool")
