"""What others call the parameters of a ResNet and of a feature pyramid, in the names of `modules.backbones`."""

import re

_KINDS = dict(conv="convolution", bn="normalization")
_SHORTCUT = ("convolution", "normalization")
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d+)|downsample\.([01]))\.(.+)")
_TORCHVISION_PYRAMID = re.compile(r"(inner|layer)_blocks\.(\d+)\.(?:0\.)?(weight|bias)")
_MMDETECTION_PYRAMID = re.compile(r"(lateral|fpn)_convs\.(\d+)\.conv\.(weight|bias)")


def resnet_name(name: str) -> str | None:
    """torchvision's and mmdetection's name in a ResNet → that in `ResNet.body`; None where they have no such name."""
    if match := re.fullmatch(r"(conv|bn)1\.(.+)", name):
        return f"embedder.embedder.{_KINDS[match[1]]}.{match[2]}"
    if match := _BLOCK.fullmatch(name):
        stage, block, kind, number, shortcut, parameter = match.groups()
        place = f"encoder.stages.{int(stage) - 1}.layers.{block}"
        if kind is None:
            return f"{place}.shortcut.{_SHORTCUT[int(shortcut)]}.{parameter}"
        return f"{place}.layer.{int(number) - 1}.{_KINDS[kind]}.{parameter}"
    return None


def pyramid_name(name: str, laterals: int) -> str | None:
    """torchvision's or mmdetection's name in a feature pyramid → that in `FPN`; None where they have no such name.

    mmdetection lists the convolutions that make further levels after those that smooth the `laterals` levels.
    """
    if match := _TORCHVISION_PYRAMID.fullmatch(name):
        return f"{dict(inner='lateral', layer='smooth')[match[1]]}.{match[2]}.{match[3]}"
    if match := _MMDETECTION_PYRAMID.fullmatch(name):
        kind, index, parameter = match[1], int(match[2]), match[3]
        if kind == "lateral":
            return f"lateral.{index}.{parameter}"
        return f"smooth.{index}.{parameter}" if index < laterals else f"extra.{index - laterals}.{parameter}"
    return None
