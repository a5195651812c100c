"""Evaluation gives one set of figures, whichever numpy computes it: `figures_numpy1.json` was written with 1.26.

As a script it writes that file anew: python tests/train/test_numpy_versions.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rigfuse.modules.camera_dropout import RandCamMask
from rigfuse.modules.completion.cascade import CompletionCascade
from rigfuse.train.data.windows import WindowConfig, build_windows, collate
from rigfuse.train.systems.completion.evaluate import Scenario, evaluate_completion
from rigfuse.train.world import WorldSettings, make_world

RECORDED = Path(__file__).with_name("figures_numpy1.json")


class Pooling(nn.Module):
    """A backbone that a person can follow, and that any torch on any machine computes alike: averages of pixels."""

    strides = (8, 16)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return [F.avg_pool2d(images.double() * self.gain, stride) for stride in self.strides]


def completion_figures():
    """Scores of the baselines on augmented windows of the built-in drive."""
    config = WindowConfig(image_size=(160, 280), history=2, resize=(1.0, 1.3), flip=True, rotation=4.0, scenes=(1, 1))
    windows, _ = build_windows(config, seed=3)
    batch = collate([windows[1, index] for index in (0, 20)]).to("cpu")
    cascade = CompletionCascade(Pooling(), RandCamMask())
    which = [Scenario("front", ("CAM_FRONT",)), Scenario("back, lost", ("CAM_BACK", "CAM_BACK_LEFT"), lost=1)]
    scores = evaluate_completion(cascade, [batch], which)
    names = ("relative_l2", "cosine", "corridor_relative_l2", "corridor_cosine")
    figures = {f"{s.scenario}/{s.method}/{s.stride}/{name}": getattr(s, name) for s in scores for name in names}
    return {name: None if np.isnan(value) else value for name, value in figures.items()}


def detection_figures(folder):
    """The official figures of a generated world's boxes, moved, turned, resized, renamed and ranked by fixed rules."""
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    make_world(folder / "world", WorldSettings(scenes=1, samples=2, width=64, sweeps=0), workers=0)
    nusc = NuScenes("v1.0-mini", str(folder / "world"), verbose=False)
    results = {sample["token"]: [] for sample in nusc.sample}
    for number, row in enumerate(nusc.sample_annotation):
        results[row["sample_token"]] += perturbed(number, row, nusc)
    meta = dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), False)
    file = folder / "results.json"
    file.write_text(json.dumps(dict(meta=meta, results=results)))
    config = config_factory("detection_cvpr_2019")
    evaluation = DetectionEval(nusc, config, str(file), "world_all", str(folder / "out"), verbose=False)
    found = evaluation.evaluate()[0].serialize()
    aps = {f"AP/{name}/{far}": ap for name, of in found["label_aps"].items() for far, ap in of.items()}
    errors = {f"{name}/{error}": value for name, of in found["label_tp_errors"].items() for error, value in of.items()}
    figures = dict(mAP=found["mean_ap"], NDS=found["nd_score"]) | found["tp_errors"] | aps | errors
    return {name: None if np.isnan(value) else float(value) for name, value in figures.items()}


def perturbed(number, row, nusc):
    from nuscenes.eval.detection.utils import category_to_detection_name

    name = category_to_detection_name(row["category_name"])
    if name is None or number % 9 == 0:
        return []
    aside = [(number * factor % 13 - 6) * 0.15 for factor in (5, 7)]
    turn = np.deg2rad(number * 11 % 40 - 20) / 2
    w, x, y, z = row["rotation"]
    velocity = nusc.box_velocity(row["token"])[:2] + [0.1 * (number % 5), -0.2 * (number % 3)]
    entry = dict(
        sample_token=row["sample_token"],
        translation=[row["translation"][0] + aside[0], row["translation"][1] + aside[1], row["translation"][2]],
        size=[side * (1 + 0.05 * (number % 4)) for side in row["size"]],
        rotation=[w * np.cos(turn) - z * np.sin(turn), x, y, z * np.cos(turn) + w * np.sin(turn)],
        velocity=np.nan_to_num(velocity).tolist(),
        detection_name="truck" if name == "car" and number % 7 == 0 else name,
        detection_score=(number * 53 % 97) / 97,
        attribute_name="",
    )
    return [entry]


def test_figures_of_completion(recorded):
    compare(completion_figures(), recorded["completion"], rel=1e-6)  # cells are compared in float32


def test_official_figures_of_detection(recorded, tmp_path):
    pytest.importorskip("nuscenes")
    compare(detection_figures(tmp_path), recorded["detection"], rel=1e-12)


@pytest.fixture
def recorded():
    return json.loads(RECORDED.read_text())


def compare(figures, expected, rel):
    assert figures.keys() == expected.keys()
    assert sum(value is not None and 0.01 < value < 0.99 for value in expected.values()) > 10  # they say something
    for name, value in figures.items():
        assert (value is None) == (expected[name] is None), name
        assert value is None or value == pytest.approx(expected[name], rel=rel, abs=rel), (
            f"{name}: numpy {np.__version__}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = dict(completion=completion_figures(), detection=detection_figures(Path(temporary)))
    RECORDED.write_text(json.dumps(dict(numpy=np.__version__, **made), indent=1) + "\n")
