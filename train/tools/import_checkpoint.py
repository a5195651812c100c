"""Makes a checkpoint of this toolkit from others' weights of a ResNet-50, with its feature pyramid where it has one.

    python train/tools/import_checkpoint.py --from torchvision resnet50-0676ba61.pth --out runs/resnet50
    python train/main.py --config completion_v2 --cfg-options model.backbone.weights=runs/resnet50/last.pt

Sources: torchvision (classification, detection with FPN), mmdetection (pytorch style), transformers (safetensors or
bin) and sparsedrive (backbone and neck; strides 4 to 32). Files are read as tensors: no code in them is run. It prints
what was filled and what was left behind; a weight that stays unfilled, or a name without a place, is an error.
"""

import argparse
import sys
from pathlib import Path

from rigfuse.train.command_line import Parser, check_new, in_one_line
from rigfuse.train.weights import SOURCES, import_backbone, read_tensors, save


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="whose names the weights have")
    parser.add_argument("file", type=Path, metavar="FILE", help="their weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder; last.pt is the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("import_checkpoint", ValueError, OSError):
        check_new("--out", chosen.out)
        imported = import_backbone(read_tensors(chosen.file), chosen.source)
        save(imported, chosen.out, chosen.source, chosen.file)
    print("\n".join(imported.report()))
    print(f"written: {chosen.out / 'last.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
