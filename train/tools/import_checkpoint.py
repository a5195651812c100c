"""Makes a checkpoint of this toolkit from others' weights of a ResNet-50, with its feature pyramid where it has one.

    python train/tools/import_checkpoint.py --from torchvision resnet50-0676ba61.pth --out runs/resnet50
    python train/main.py --config completion_v2 --cfg-options model.backbone.weights=runs/resnet50/last.pt

Sources: torchvision (classification, detection with FPN), mmdetection (pytorch style), transformers (safetensors or
bin), sparsedrive (backbone and neck; strides 4 to 32; with --whole the whole driving model of stage 2) and cmt (the
whole camera + LiDAR detector, voxel0100_r50_800x320: `--config cmt_aqr_upstream_voxel0100_r50_800x320_cbgs --weights
runs/cmt/last.pt` fine-tunes the routing on it). Files are read as tensors: no code in them is run. It prints what was
filled and what was left behind; a weight that stays unfilled, or a name without a place, is an error.
"""

import argparse
import sys
from pathlib import Path

from rigfuse.train.command_line import Parser, check_new, in_one_line
from rigfuse.train.systems.cmt_aqr import upstream as cmt
from rigfuse.train.systems.sparse_drive.upstream import FRAME, import_whole
from rigfuse.train.weights import SOURCES, Imported, import_backbone, read_tensors, save


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--from", dest="source", required=True, choices=(*SOURCES, "cmt"), help="whose names the weights have"
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="their weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder; last.pt is the result")
    parser.add_argument("--whole", action="store_true", help="sparsedrive: the driving model, not its backbone alone")
    chosen = parser.parse_args(arguments)
    if chosen.whole and chosen.source != "sparsedrive":
        parser.error("--whole needs --from sparsedrive")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    with in_one_line("import_checkpoint", ValueError, OSError):
        check_new("--out", chosen.out)
        state = read_tensors(chosen.file)
        if chosen.whole:
            imported = Imported(import_whole(state), [], (4, 8, 16, 32), None)
            lines = [f"all {len(imported.weights)} tensors of the driving model filled; {FRAME}"]
        elif chosen.source == "cmt":
            imported = Imported(cmt.import_whole(state), [], (16,), None)
            lines = cmt.report(imported.weights)
        else:
            imported = import_backbone(state, chosen.source)
            lines = imported.report()
        save(imported, chosen.out, chosen.source, chosen.file)
    print("\n".join(lines))
    print(f"written: {chosen.out / 'last.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
