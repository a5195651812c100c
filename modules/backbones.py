"""Image backbone: ResNet and a feature pyramid, at the strides of either convention in use."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.runtime.extras import optional
from .backbone_names import resnet_name
from .settings import Count, Range, Whole

transformers = optional("modules", "transformers")

_SIZES = {
    "resnet50": dict(
        embedding_size=64, hidden_sizes=(256, 512, 1024, 2048), depths=(3, 4, 6, 3), layer_type="bottleneck"
    ),
    "resnet34": dict(embedding_size=64, hidden_sizes=(64, 128, 256, 512), depths=(3, 4, 6, 3), layer_type="basic"),
    "tiny": dict(embedding_size=16, hidden_sizes=(16, 32, 64, 128), depths=(1, 1, 1, 1), layer_type="basic"),
}
_STAGE_STRIDES = (4, 8, 16, 32)


@dataclass
class BackboneConfig:
    """Settings of a `ResNet`."""

    resnet: Literal["resnet50", "resnet34", "tiny"] = "resnet50"
    weights: str | None = None  # a checkpoint of this toolkit, or transformers' folder or hub name; None = random
    frozen_stages: Annotated[int, Range(at_least=-1, at_most=4)] = 4  # with their statistics; stem = 0, −1 = none
    norm_eval: bool = True  # every batch norm keeps its statistics in training too


@dataclass
class PyramidConfig(BackboneConfig):
    """Settings of a `ResNetFPN`."""

    strides: tuple[Count, ...] = (8, 16, 32, 64)  # of the levels: consecutive powers of two that begin between 4 and 32
    remember: Whole = 0  # images whose maps are kept while everything is frozen, so that none is computed twice


class ResNet(nn.Module):
    """ResNet (He et al. 2016, transformers' implementation).

    Args:
        config: see `BackboneConfig`.
        strides: of the maps returned, some of 4, 8, 16 and 32, ascending.

    `channels` says how many channels each map has.

    Raises:
        ValueError: the strides do not fit, or `config.weights` leave a parameter unfilled; the names are told.
    """

    def __init__(self, config: BackboneConfig, strides: tuple[int, ...] = _STAGE_STRIDES):
        super().__init__()
        if not strides or tuple(strides) != tuple(stride for stride in _STAGE_STRIDES if stride in strides):
            raise ValueError(f"strides is {strides}, needs some of {_STAGE_STRIDES}, ascending")
        self.strides, self.frozen_stages, self.norm_eval = tuple(strides), config.frozen_stages, config.norm_eval
        stages = [_STAGE_STRIDES.index(stride) for stride in strides]
        size = transformers.ResNetConfig(
            **_SIZES[config.resnet], out_features=[f"stage{index + 1}" for index in stages]
        )
        self.body = transformers.ResNetBackbone(size)
        self.channels = tuple(size.hidden_sizes[index] for index in stages)
        for stage in self._frozen():
            stage.requires_grad_(False)
        if config.weights:
            _load(self.body, "body", config.weights)

    def random_parts(self) -> list[str]:
        """Names the parts that are as random as they were made: nobody has trained them, and no weights were loaded."""
        return ["ResNet"] if untouched_norms(self.body) else []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Turns images (N, 3, H, W), normalised, into one (N, C, ⌈H/stride⌉, ⌈W/stride⌉) for each stride."""
        return list(self.body(images).feature_maps)

    def train(self, mode: bool = True):
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [self.body.embedder, *self.body.encoder.stages][: self.frozen_stages + 1]


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017).

    Args:
        in_channels: C of each map that comes in, each half the size of the one before.
        channels: C of every level.
        levels: how many to return, the finest first: fewer than maps come in, or more, each a strided convolution of
            the one before; None = as many.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int, *, levels: int | None = None):
        super().__init__()
        levels = len(in_channels) if levels is None else levels
        if levels < 1:
            raise ValueError(f"FPN: levels is {levels}, needs at least 1")
        kept, extra = min(levels, len(in_channels)), max(levels - len(in_channels), 0)
        self.lateral = nn.ModuleList(nn.Conv2d(before, channels, 1) for before in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(kept))
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(extra))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Turns one map (N, C, H, W) for each of `in_channels` into `levels` maps (N, channels, H, W)."""
        maps = [layer(x) for layer, x in zip(self.lateral, maps, strict=True)]
        for finer, coarser in zip(reversed(maps[:-1]), reversed(maps[1:])):
            finer += F.interpolate(coarser, size=finer.shape[-2:], mode="nearest")
        levels = [layer(x) for layer, x in zip(self.smooth, maps)]
        for layer in self.extra:
            levels.append(layer(levels[-1]))
        return levels


class ResNetFPN(ResNet):
    """`ResNet` with an `FPN` on top.

    Args:
        config: see `PyramidConfig`. The strides are (8, 16, 32, 64) in the design documents, (4, 8, 16, 32) in upstream
            SparseDrive. Levels beyond 32 are strided convolutions of the one before. Weights without any of the
            pyramid leave that random.
        channels: C of every level.
    """

    def __init__(self, config: PyramidConfig, channels: int):
        strides = config.strides
        powers = all(stride in (4, 8, 16, 32, 64, 128) for stride in strides)
        if not strides or not powers or any(b != 2 * a for a, b in zip(strides, strides[1:])) or strides[0] > 32:
            raise ValueError(f"strides is {strides}, needs consecutive powers of two that begin between 4 and 32")
        super().__init__(config, tuple(stride for stride in strides if stride in _STAGE_STRIDES))
        self.fpn = FPN(self.channels, channels, levels=len(strides))
        self.strides = tuple(strides)
        if config.weights:
            _load(self.fpn, "fpn", config.weights)

        self._memory, self._room = {}, config.remember
        self.register_load_state_dict_post_hook(lambda module, _: module._memory.clear())

    def random_parts(self) -> list[str]:
        return super().random_parts() + (["FPN"] if _untouched_convolutions(self.fpn) else [])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Turns images (N, 3, H, W), normalised, into one (N, channels, ⌈H/stride⌉, ⌈W/stride⌉) for each stride."""
        if not self._room or any(parameter.requires_grad for parameter in self.parameters()):
            return self.fpn(super().forward(images))
        kind = images.device, torch.is_autocast_enabled(images.device.type)
        keys = [(*kind, hashlib.blake2b(image.contiguous().cpu().numpy()).digest()) for image in images]
        places = {key: place for place, key in enumerate(keys) if key not in self._memory}
        found = {key: self._memory[key] for key in keys if key not in places}
        if places:
            maps = self.fpn(super().forward(images[list(places.values())]))
            found |= {key: [x[row].clone() for x in maps] for row, key in enumerate(places)}
            self._memory |= {key: found[key] for key in places}
            for key in list(self._memory)[: max(len(self._memory) - self._room, 0)]:
                del self._memory[key]
        return [torch.stack(level) for level in zip(*(found[key] for key in keys))]

    def _apply(self, *arguments, **settings):
        self._memory.clear()  # what follows is of another device or dtype
        return super()._apply(*arguments, **settings)


# ---- weights


def _load(module: nn.Module, part: str, source: str) -> None:
    """Gives `module`, the "body" or the "fpn" of a backbone, its weights from `source`, every one of them.

    Weights without any of the pyramid leave that as it is.
    """
    path = Path(source)
    there = _of_checkpoint(path, part) if path.is_file() else _of_transformers(source, part)
    own = module.state_dict()
    if part == "fpn" and not there:
        return
    lacking = [name for name in own if name not in there]
    other = [n for n in own if n in there and own[n].shape != there[n].shape]
    problems = (
        [f"lacks {len(lacking)} of {len(own)} weights of the backbone's {part} ({_few(lacking)})"] if lacking else []
    )
    if other:
        shapes = f"{tuple(there[other[0]].shape)} where {tuple(own[other[0]].shape)} is needed"
        problems.append(f"has {_few(other)} of another shape ({shapes})")
    if problems:
        raise ValueError(f"weights: {source} {' and '.join(problems)}")
    module.load_state_dict({name: there[name] for name in own})


def _of_checkpoint(path, part):
    """The weights of `part` in a checkpoint of this toolkit, under the names inside that part."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of foreign bytes may raise
        raise ValueError(f"weights: {path} cannot be read as tensors ({_first_line(error)})") from None
    names = state.get("model") if isinstance(state, dict) else None
    if not isinstance(names, dict):
        theirs = any(resnet_name(name.split("backbone.")[-1]) for name in _names(state))
        how = "these are the names of torchvision or mmdetection; " if theirs else ""
        tool = "train/tools/import_checkpoint.py makes one of others' weights"
        raise ValueError(f"weights: {path} is no checkpoint of this toolkit ({how}{tool})")
    marker = f"backbone.{part}."
    found = {name.partition(marker)[2]: value for name, value in names.items() if marker in f".{name}"}
    if part == "body" and not found:
        raise ValueError(f"weights: {path} has no backbone: none of its names has a part {marker!r}")
    return found


def _of_transformers(source, part):
    """The same of a folder or a hub name that transformers reads, which has no pyramid."""
    if part != "body":
        return {}
    own = transformers.ResNetConfig.from_pretrained(source)
    network, report = transformers.ResNetBackbone.from_pretrained(source, config=own, output_loading_info=True)
    if report["missing_keys"]:
        there = f"{source} leaves {len(report['missing_keys'])} weights of a ResNet unfilled"
        how = "train/tools/import_checkpoint.py reads other names than those of transformers"
        raise ValueError(f"weights: {there} ({_few(sorted(report['missing_keys']))}); {how}")
    return network.state_dict()


def _names(state):
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []


def _few(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def untouched_norms(module: nn.Module) -> bool:
    """Whether every batch norm is as it was made: scale and variance 1, shift and mean 0; True where there is none."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    ones = all(bool((x == 1).all()) for layer in norms for x in (layer.weight, layer.running_var))
    return ones and not any(bool(x.any()) for layer in norms for x in (layer.bias, layer.running_mean))


def _untouched_convolutions(module: nn.Module) -> bool:
    """Whether no weight has left the interval that PyTorch draws a convolution's from; a step of training is enough."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return all(layer.weight.abs().max() <= 1.00001 * layer.weight[0].numel() ** -0.5 for layer in layers)
