"""Detections → nuScenes' results file → the official figures, through nuscenes-devkit."""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from ...modules.detection.boxes import DETECTION_CLASSES, Detections
from ...modules.poses import from_row
from ..data.nuscenes import evaluation_view, open_nuscenes, reference_row, scenes_of_split
from .submission import result_rows

_ERRORS = dict(mATE="trans_err", mASE="scale_err", mAOE="orient_err", mAVE="vel_err", mAAE="attr_err")
FIGURES = ("mAP", "NDS", *_ERRORS, *(f"AP/{name}" for name in DETECTION_CLASSES))


def evaluate_detection(
    detections: Mapping[str, Detections],
    root: str | Path,
    version: str | None,
    split: str,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Computes the official figures of detections (configuration detection_cvpr_2019), the same on every rank.

    Every rank gives what it found; the first one joins them and evaluates, so all ranks must call this. A sample that
    several ranks have counts once. A sample without detections counts as one in which nothing was found.

    Args:
        detections: sample token → boxes in the reference ego frame, see `Detections`; on any device.
        root, version: of the data, as in `nuscenes_drives`.
        split: e.g. "mini_val", or a split of `<root>/<version>/splits.json`.
        out: a folder for results.json and, if anything was found, metrics_summary.json; None = they are not kept.

    Returns:
        mAP, NDS, mATE (metres), mASE (1 − IoU), mAOE (radians), mAVE (m/s), mAAE (1 − accuracy), and AP/CLASS.

    Raises:
        ImportError: nuscenes-devkit is not installed.
        ValueError: an unknown split, one without objects or not of this version, or a token that is not in it.
    """
    figures = [None]
    joined = _gather(detections)
    if joined is not None:
        with TemporaryDirectory() as folder:
            figures = [_evaluate(joined, root, version, split, Path(out or folder))]
    if dist.is_initialized():
        dist.broadcast_object_list(figures, src=0)
    return figures[0]


def write_results(detections: Mapping[str, Detections], nusc, split: str, path: str | Path) -> int:
    """Writes nuScenes' results file: every sample of the split, in the global frame, the 500 best boxes of each.

    The attribute follows from class and speed. An unknown velocity is written as 0; boxes that are not finite or have
    no volume are left out.

    Args:
        detections: as for `evaluate_detection`.
        nusc: the devkit's `NuScenes`, see `open_nuscenes`.
        split: as for `evaluate_detection`.
        path: of the file.

    Returns:
        The number of boxes in it.

    Raises:
        ValueError: an unknown split, one without samples, or a token that is not in it.
    """
    from nuscenes.eval.common.loaders import get_samples_of_scenes

    tokens = get_samples_of_scenes(scenes_of_split(Path(nusc.dataroot, nusc.version), split), nusc)
    if not tokens:
        raise ValueError(f"no sample of the split {split!r} is in {nusc.dataroot}")
    foreign = sorted(detections.keys() - set(tokens))
    if foreign:
        raise ValueError(f"{len(foreign)} samples with detections are not in the split {split!r}: {foreign[0]}, …")
    results = {token: _entries(detections[token], nusc, token) if token in detections else [] for token in tokens}
    meta = dict(use_camera=True, use_lidar=True, use_radar=False, use_map=False, use_external=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"meta": meta, "results": results}, allow_nan=False))
    return sum(map(len, results.values()))


def _entries(found: Detections, nusc, token) -> list[dict]:
    """The rows of the results file for one sample, best first."""
    pose = nusc.get("ego_pose", reference_row(nusc, nusc.get("sample", token))["ego_pose_token"])
    names = [DETECTION_CLASSES[label] for label in found.labels.tolist()]
    return result_rows(token, found.boxes.cpu(), names, found.scores.cpu(), from_row(pose))


def _evaluate(detections, root, version, split, out):
    nusc = open_nuscenes(root, version)
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    results = out / "results.json"
    if not write_results(detections, nusc, split, results):  # with no box at all the devkit breaks
        return dict(mAP=0.0, NDS=0.0) | dict.fromkeys(_ERRORS, 1.0) | {f"AP/{name}": 0.0 for name in DETECTION_CLASSES}
    config = config_factory("detection_cvpr_2019")
    # The devkit shows progress bars even when told to be quiet, and makes a folder for plots.
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            scenes = scenes_of_split(Path(nusc.dataroot, nusc.version), split)
            view, name = evaluation_view(nusc, scenes, folder)
            evaluation = DetectionEval(view, config, str(results), name, folder, verbose=False)
        except Exception as error:  # what it raises for a split of another version, or one without objects
            raise ValueError(f"nuscenes-devkit cannot evaluate {split!r} of {root}: {error}") from error
        metrics = evaluation.evaluate()[0].serialize()
    (out / "metrics_summary.json").write_text(json.dumps(metrics, indent=2))
    figures = dict(mAP=metrics["mean_ap"], NDS=metrics["nd_score"])
    figures |= {name: metrics["tp_errors"][error] for name, error in _ERRORS.items()}
    figures |= {f"AP/{name}": metrics["mean_dist_aps"][name] for name in DETECTION_CLASSES}
    return {name: float(value) for name, value in figures.items()}


def _gather(detections):
    """The detections of all ranks on the first one, None on the others."""
    share = {token: Detections(x.boxes.cpu(), x.scores.cpu(), x.labels.cpu()) for token, x in detections.items()}
    if not dist.is_initialized():
        return share
    shares = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(share, shares, dst=0)
    if shares is None:
        return None
    return {token: found for share in reversed(shares) for token, found in share.items()}  # the lowest rank wins
