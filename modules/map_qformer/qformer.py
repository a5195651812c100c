"""The Q-Former: a fixed number of scene tokens from any number of image tokens."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...kernels.runtime.extras import optional
from ..settings import Count, Momentum

transformers = optional("modules", "transformers")


@dataclass
class QFormerConfig:
    """Settings of a `SceneQFormer`; the defaults are BLIP-2's (Li et al. 2023)."""

    width: Count = 768
    layers: Count = 12
    heads: Count = 12
    hidden: Count = 3072
    dropout: Momentum = 0.1
    grid: tuple[Count, Count] = (8, 16)  # scene tokens of each camera: rows and columns
    weights: str | None = None  # a file of tensors, or a folder with model.safetensors; None = random

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, needs a divisor of {self.width}")


class SceneQFormer(nn.Module):
    """Turns image tokens into scene tokens of a language model's width.

    transformers' `Blip2QFormerModel`: queries attend to one another, and in every other layer to the image tokens. A
    query is a learned vector and the mean of one part of one camera's image, so that it begins with a place of its own;
    of a missing camera it is the vector alone. What the Q-Former says is projected and brought to the scale of the
    language model's own embeddings.

    Args:
        config: see `QFormerConfig`.
        cameras: their number.
        width: of the scene tokens.
        scale: root mean square of the scene tokens before training.

    Raises:
        ValueError: `config.weights` do not fit, in name or shape; nothing is loaded in part.
    """

    def __init__(self, config: QFormerConfig, cameras: int, width: int, scale: float):
        super().__init__()
        size = transformers.Blip2QFormerConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            intermediate_size=config.hidden, encoder_hidden_size=config.width, hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout, attn_implementation="sdpa",
        )  # fmt: skip
        self.queries = nn.Parameter(0.02 * torch.randn(cameras * config.grid[0] * config.grid[1], config.width))
        self.body = transformers.Blip2QFormerModel(size)
        self.project = nn.Linear(config.width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, scale)
        if config.weights:
            _load(self.body, Path(config.weights))

    def forward(self, tokens: torch.Tensor, parts: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        """Reads tokens (B, K, C), those that are `there` (B, K) bool, None = all: (B, scene tokens, width). `parts`
        (B, scene tokens, C) are what the queries begin with.

        Raises:
            ValueError: nothing of a sample is there.
        """
        if there is not None and not bool(there.any(dim=1).all()):
            raise ValueError("SceneQFormer: all cameras of a sample are missing, needs at least one")
        queries = self.queries + parts
        found = self.body(queries, encoder_hidden_states=tokens, encoder_attention_mask=there).last_hidden_state
        return self.norm(self.project(found))


def _load(body: nn.Module, path: Path) -> None:
    """Fills every weight of the Q-Former from a file, which may hold the rest of a BLIP-2 model too."""
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        names = {name.rpartition("qformer.body.")[2].rpartition("qformer.")[2]: name for name in state}
    except Exception as error:  # whatever a reader of foreign bytes may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"qformer.weights: {path} cannot be read as tensors ({reason})") from None
    own = body.state_dict()
    lacking = [name for name in own if name not in names]
    wrong = [name for name in own if name in names and state[names[name]].shape != own[name].shape]
    told = [f"lacks {', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}"] if lacking else []
    for name in wrong[:3]:
        told.append(f"has {name} as {tuple(state[names[name]].shape)}, needs {tuple(own[name].shape)}")
    if told:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"qformer.weights: {path} does not fit the Q-Former, nothing is loaded: it {'; '.join(told)}{more}"
        )
    body.load_state_dict({name: state[names[name]] for name in own})
