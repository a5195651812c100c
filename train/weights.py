"""Weights of others' image backbones, under the names of this toolkit.

A source is whose names they are. Each is read as tensors alone (`weights_only`), every name of its backbone has to find
a place, and every weight of the network here has to be filled; what belongs to other parts is listed and left behind.

source         backbone                                pyramid
torchvision    "" or "backbone.body."                  "backbone.fpn."
mmdetection    "backbone." or ""                       "neck."
sparsedrive    "img_backbone."                         "img_neck."
transformers   "resnet.", "model.", "backbone." or ""  none
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..modules.backbone_names import pyramid_name, resnet_name
from ..modules.backbones import FPN, BackboneConfig, ResNet
from . import checkpoint

SOURCES = ("torchvision", "mmdetection", "transformers", "sparsedrive")
_PARTS = {  # source → prefixes that the backbone's names may have, the longest first, and the pyramid's
    "torchvision": (("backbone.body.", ""), "backbone.fpn."),
    "mmdetection": (("backbone.", ""), "neck."),
    "transformers": (("resnet.", "model.", "backbone.", ""), None),
    "sparsedrive": (("img_backbone.",), "img_neck."),
}
_LATERAL = re.compile(r"(lateral_convs|inner_blocks)\.\d+\.(\w+\.)?weight$")
_STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, eq=False)
class Imported:
    """A backbone's weights by the names of this toolkit.

    Args:
        weights: "backbone.body.…" and, where the source has a pyramid, "backbone.fpn.…".
        left_behind: the source's names that belong to other parts.
        strides: of the pyramid's levels, those of the ResNet's maps where there is none.
        channels: of the pyramid's levels; None where there is none.
    """

    weights: dict[str, torch.Tensor]
    left_behind: list[str]
    strides: tuple[int, ...]
    channels: int | None

    def report(self) -> list[str]:
        """What was filled, and what was left behind, in lines."""
        parts = Counter(name.split(".")[1] for name in self.weights)
        lines = [f"backbone.{part}: all {count} tensors filled" for part, count in parts.items()]
        if self.channels is None:
            lines.append("backbone.fpn: the source has no pyramid; it stays random until it is trained")
        else:
            lines.append(f"levels of {self.channels} channels at strides {', '.join(map(str, self.strides))}")
        left = Counter(name.split(".")[0] for name in self.left_behind)
        lines += [f"left behind: {part}, {count} tensors" for part, count in sorted(left.items())]
        return lines


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file by name: one of `torch.save`, or safetensors.

    A state dict may stand under "state_dict" or "model"; names lose the "module." of parallel training. Code in
    the file is never run.

    Raises:
        ValueError: the file cannot be read as that.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of foreign bytes may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as tensors ({reason})") from None
    if isinstance(state, dict) and "caffe" in str(state.get("meta", "")):
        raise ValueError(
            f"{path} is of caffe style (other strides, BGR, other normalisation), which no network here has"
        )
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = state if isinstance(state, dict) else {}
    tensors = {name.removeprefix("module."): x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name")
    return tensors


def import_backbone(state: dict[str, torch.Tensor], source: str) -> Imported:
    """Finds the place of every name of a ResNet-50 and of its feature pyramid.

    Args:
        state: tensors by the source's names.
        source: one of `SOURCES`.

    Raises:
        ValueError: there is no backbone, a name of it finds no place, a weight stays unfilled, or a shape is another;
            the names are listed.
    """
    prefixes, neck = _PARTS[source]
    rename = (lambda name: name) if source == "transformers" else resnet_name
    start = next((p for p in prefixes if any(rename(n[len(p) :]) in _BODY for n in state if n.startswith(p))), None)
    if start is None:
        raise ValueError(f"there is no ResNet with the names of {source}; the first name is {min(state)!r}")
    laterals = sum(bool(neck) and name.startswith(neck) and bool(_LATERAL.search(name)) for name in state)
    weights, homeless, left_behind = {}, [], []
    for name, tensor in state.items():
        if neck and name.startswith(neck):
            ours, part = pyramid_name(name[len(neck) :], laterals), "fpn"
        elif name.startswith(start):
            ours, part = rename(name[len(start) :]), "body"
        else:
            ours, part = None, None
        if ours is not None:
            weights[f"backbone.{part}.{ours}"] = tensor.float() if tensor.is_floating_point() else tensor
        elif part is None or (part == "body" and not start):
            left_behind.append(name)
        else:
            homeless.append(name)
    for name, own in _BODY.items():  # a count that nothing here reads, and that FrozenBatchNorm2d does not have
        if name.endswith("num_batches_tracked"):
            weights.setdefault(f"backbone.body.{name}", torch.zeros_like(own, device="cpu"))
    needed = {f"backbone.body.{name}": tensor for name, tensor in _BODY.items()}
    strides, channels, own = _pyramid(weights)
    _check(weights, needed | own, homeless, source)
    return Imported(weights, left_behind, strides, channels)


def _pyramid(weights):
    """(strides, channels, its weights by name) of the pyramid that some weights are of."""
    laterals = [
        weights[name] for name in sorted(weights) if name.startswith("backbone.fpn.lateral") and "weight" in name
    ]
    if not laterals:
        return _STRIDES, None, {}
    widths = (256, 512, 1024, 2048)
    into, channels = tuple(x.shape[1] for x in laterals), laterals[0].shape[0]
    if into != widths[-len(into) :]:
        raise ValueError(f"the pyramid takes maps of {into} channels, a ResNet-50 has {widths}")
    extra = sum(name.startswith("backbone.fpn.extra") and name.endswith("weight") for name in weights)
    with torch.device("meta"):
        fpn = FPN(into, channels, levels=len(into) + extra)
    strides = tuple(_STRIDES[-len(into)] * 2**level for level in range(len(into) + extra))
    return strides, channels, {f"backbone.fpn.{name}": x for name, x in fpn.state_dict().items()}


def _check(weights, needed, homeless, source):
    problems = [f"no place for {', '.join(homeless)}"] if homeless else []
    unfilled = [name for name in needed if name not in weights]
    problems += [f"nothing for {', '.join(unfilled)}"] if unfilled else []
    problems += [
        f"{name} is {tuple(weights[name].shape)}, needs {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    surplus = [name for name in weights if name not in needed]
    problems += [f"the network here has no {', '.join(surplus)}"] if surplus else []
    if problems:
        raise ValueError(f"the weights of {source} do not fit: {'; '.join(problems)}")


def save(imported: Imported, folder: str | Path, source: str, file: str | Path) -> Path:
    """Writes a checkpoint that `backbone.weights` and `--weights` take; OSError where it cannot be written."""
    origin = dict(name=f"imported-{source}", file=Path(file).name, strides=list(imported.strides))
    return checkpoint.save(folder, 0, dict(model=imported.weights, counters=dict(step=0), config=origin), keep=1)


with torch.device("meta"):
    _BODY = ResNet(BackboneConfig()).body.state_dict()  # name → shape, of a ResNet-50
