"""Tracks → nuScenes' results file → the official figures, through nuscenes-devkit and motmetrics."""

import io
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from ...kernels.runtime.extras import require
from ...modules.poses import from_row
from ..data.nuscenes import evaluation_view, open_nuscenes, reference_row, scenes_of_split
from .pooling import SampleResults
from .submission import TRACKING_CLASSES, result_rows

_FIGURES = (
    "amota",
    "amotp",
    "recall",
    "motar",
    "mota",
    "motp",
    "gt",
    "mt",
    "ml",
    "faf",
    "tp",
    "fp",
    "fn",
    "ids",
    "frag",
)
_META = dict(use_camera=True, use_lidar=True, use_radar=False, use_map=False, use_external=False)


class TrackingMetric(SampleResults):
    """The official tracking figures (configuration tracking_nips_2019) of a split.

    A scene must be tracked as a whole by one rank, whose ids then hold within the scene.

    Args:
        root, version: of the data, as for `nuscenes_drives`.
        split: e.g. "mini_val", or a split of `<root>/<version>/splits.json`.
        out: a folder for results.json and metrics_summary.json; None = they are not kept.
    """

    def __init__(self, root: str | Path, version: str | None, split: str, out: str | Path | None = None):
        super().__init__(root=str(root), version=version, split=split)
        self.out = out

    def add(self, token: str, boxes, names: Sequence[str], scores, ids: Sequence) -> None:
        """Adds one sample.

        Args:
            token: of the sample.
            boxes: (K, 9) in its reference ego frame, see `result_rows`.
            names: K detection classes; those that are not tracked are left out.
            scores: (K,).
            ids: K names or numbers, one for each object, the same in all samples of a scene.

        Raises:
            ValueError: not one of each for every box, or an id twice.
        """
        boxes, scores = (np.asarray(values, dtype=np.float64) for values in (boxes, scores))
        ids = [str(int(one)) if not isinstance(one, str) else one for one in ids]
        if not len(boxes) == len(names) == len(scores) == len(ids) == len(set(ids)):
            counts = (
                f"{len(boxes)} boxes, {len(names)} names, {len(scores)} scores, {len(ids)} ids, {len(set(ids))} of them"
            )
            raise ValueError(f"TrackingMetric.add: sample {token} has {counts} different; need one for each box")
        self.samples.setdefault(token, (boxes.reshape(-1, 9), list(names), scores, ids))

    def compute(self) -> dict[str, float | None]:
        """AMOTA, AMOTP (metres), RECALL, MOTA, … as the devkit's summary has them, and AMOTA/CLASS.

        What the devkit gives as NaN, such as the figures of a class that is not in the split, is None. A sample that
        was not added counts as one without tracks.

        Raises:
            ImportError: nuscenes-devkit or motmetrics is not installed.
            ValueError: an unknown split, one of another version, or a token that is not in it.
        """
        nusc, split = open_nuscenes(self.settings["root"], self.settings["version"]), self.settings["split"]
        require("nuscenes", "motmetrics", "pandas")
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.tracking import evaluate as devkit

        with TemporaryDirectory() as folder:
            out = Path(self.out or folder)
            results = out / "results.json"
            if not self.write(nusc, results):
                results = _with_a_box_far_away(results, Path(folder) / "far.json")
            # The devkit prints, shows progress, warns of means of nothing, and writes a summary with NaN.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    config = config_factory("tracking_nips_2019")
                    view, name = evaluation_view(nusc, scenes_of_split(_tables(nusc), split), folder)
                    place = dict(nusc_version=view.version, nusc_dataroot=view.dataroot)
                    with patch.object(devkit, "NuScenes", lambda **_: view):  # it would open the tables anew
                        evaluation = devkit.TrackingEval(config, str(results), name, folder, **place, verbose=False)
                    summary = evaluation.evaluate()[0].serialize()
                except Exception as error:  # what it raises for a split of another version, or one without objects
                    text = f"nuscenes-devkit cannot evaluate {split!r} of {nusc.dataroot}: {error}"
                    raise ValueError(text) from error
            summary = _without_nan(summary)
            (out / "metrics_summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
        figures = {name.upper(): summary[name] for name in _FIGURES}
        return figures | {f"AMOTA/{name}": summary["label_metrics"]["amota"][name] for name in TRACKING_CLASSES}

    def write(self, nusc, path: str | Path) -> int:
        """Writes nuScenes' results file with every sample of the split, and returns the number of boxes in it.

        Args:
            nusc: the devkit's `NuScenes`, see `open_nuscenes`.
            path: of the file.

        Raises:
            ValueError: an unknown split, one without samples, or a token that is not in it.
        """
        from nuscenes.eval.common.loaders import get_samples_of_scenes

        split = self.settings["split"]
        tokens = get_samples_of_scenes(scenes_of_split(_tables(nusc), split), nusc)
        if not tokens:
            raise ValueError(f"no sample of the split {split!r} is in {nusc.dataroot}")
        foreign = sorted(self.samples.keys() - set(tokens))
        if foreign:
            raise ValueError(f"{len(foreign)} samples with tracks are not in the split {split!r}: {foreign[0]}, …")
        results = {token: self._rows(nusc, token) if token in self.samples else [] for token in tokens}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"meta": _META, "results": results}, allow_nan=False))
        return sum(map(len, results.values()))

    def _rows(self, nusc, token):
        sample = nusc.get("sample", token)
        scene = nusc.get("scene", sample["scene_token"])["name"]
        pose = nusc.get("ego_pose", reference_row(nusc, sample)["ego_pose_token"])
        boxes, names, scores, ids = self.samples[token]
        return result_rows(token, boxes, names, scores, from_row(pose), [f"{scene}/{one}" for one in ids])


def _tables(nusc) -> Path:
    return Path(nusc.dataroot, nusc.version)


def _with_a_box_far_away(results, path):
    """A results file without boxes breaks the devkit; one that is out of range it leaves out."""
    content = json.loads(results.read_text())
    token = next(iter(content["results"]))
    box = [[1e6, 1e6, 0, 4, 2, 1.5, 0, 0, 0]]
    content["results"][token] = result_rows(token, box, ["car"], [0.0], np.eye(4), ["none"])
    path.write_text(json.dumps(content))
    return path


def _without_nan(value):
    """NaN and infinity as None, at any depth."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
