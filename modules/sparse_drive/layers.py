"""Building blocks of the driving head: small networks, attention, the asymmetric feed-forward network."""

from contextlib import AbstractContextManager

import torch
from torch import nn

PRIOR = 0.01  # score of every class before training
PRIOR_BIAS = -4.59511985013459  # its logit


def mlp(channels: int, *, linears: int, norms: int, inputs: int | None = None) -> nn.Sequential:
    """`norms` times: `linears` pairs of a linear layer and a ReLU, then a layer norm."""
    layers = []
    width = channels if inputs is None else inputs
    for _ in range(norms):
        for _ in range(linears):
            layers += [nn.Linear(width, channels), nn.ReLU()]
            width = channels
        layers.append(nn.LayerNorm(channels))
    return nn.Sequential(*layers)


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """Autocast off on the device of `tensor`: coordinates in metres do not survive bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


def widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in float32, or in float64 where they are."""
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N) → (B, min(count, N)) int64, places of the highest scores, descending; of equal ones the first wins."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def take(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, N, …) at (B, K) → (B, K, …)."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], places]


class Attention(nn.Module):
    """Multi-head attention that adds what it finds to its query.

    Args:
        width: of queries, keys and values.
        heads: attention heads.
        dropout: of the attention's weights, and of what is added.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_position: torch.Tensor | None = None,
        key_position: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (B, N, width), key and value (B, K, width); positions are added to query and key; hidden (B, K) bool,
        True = nobody attends to this key. Returns (B, N, width)."""
        located = query if query_position is None else query + query_position
        key = key if key_position is None else key + key_position
        found = self.attention(located, key, value, key_padding_mask=hidden, need_weights=False)[0]
        return query + self.dropout(found)


class InstanceMixing(nn.Module):
    """How instances attend to instances: with embeddings beside the features, or added to them.

    Decoupled (Sparse4D v3: Lin et al. 2023), queries and keys are features and embeddings side by side, twice as wide,
    so that where things are and what they are do not interfere; values are widened before and narrowed after by layers
    that all of a decoder's attentions share.
    """

    def __init__(self, channels: int, decoupled: bool):
        super().__init__()
        self.decoupled = decoupled
        self.width = 2 * channels if decoupled else channels
        self.widen = nn.Linear(channels, self.width, bias=False) if decoupled else nn.Identity()
        self.narrow = nn.Linear(self.width, channels, bias=False) if decoupled else nn.Identity()

    def forward(
        self,
        layer: Attention,
        feature: torch.Tensor,
        embedding: torch.Tensor,
        key: torch.Tensor | None = None,
        key_embedding: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """feature, embedding (B, N, C) attend to key, key_embedding (B, K, C), or without these to themselves."""
        key, key_embedding = (feature, embedding) if key is None else (key, key_embedding)
        value = self.widen(key)
        if self.decoupled:
            query, key = (torch.cat(pair, dim=-1) for pair in ((feature, embedding), (key, key_embedding)))
            return self.narrow(layer(query, key, value, hidden=hidden))
        found = layer(feature, key, value, query_position=embedding, key_position=key_embedding, hidden=hidden)
        return self.narrow(found)

    def alone(self, layer: Attention, feature: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """What temporal attention does without a past: the instances attend to themselves, and the values are the keys
        before any position is added (so, decoupled, they carry the embedding and are not widened)."""
        if self.decoupled:
            both = torch.cat([feature, embedding], dim=-1)
            return self.narrow(layer(both, both, both))
        return self.narrow(layer(feature, feature, feature, query_position=embedding, key_position=embedding))


class FeedForward(nn.Module):
    """Layer norm, then two linear layers beside a linear shortcut, so that the width may change (Sparse4D).

    Args:
        inputs: width of what comes in.
        channels: width of what goes out.
        hidden: width between.
        dropout: after the ReLU and after the second layer.
    """

    def __init__(self, inputs: int, channels: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.expand = nn.Linear(inputs, hidden)
        self.reduce = nn.Linear(hidden, channels)
        self.shortcut = nn.Linear(inputs, channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.expand, self.reduce, self.shortcut):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, channels)."""
        x = self.norm(x)
        hidden = self.dropout(torch.relu(self.expand(x)))
        return self.shortcut(x) + self.dropout(self.reduce(hidden))
