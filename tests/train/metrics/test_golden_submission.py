"""Rows of results files against SparseDrive's own conversion of made-up boxes."""

import json

import numpy as np
import pytest

from rigfuse.modules.poses import from_row
from rigfuse.train.metrics.submission import CLASS_RANGES, result_rows
from support.golden import golden_sets

SETS = golden_sets("submission_format")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of the submission format beside the checkout")
CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip


def written(inputs, token, place, task):
    """Our rows; tracking is given what upstream's threshold leaves."""
    own = {name.split("/", 1)[1]: values for name, values in inputs.items() if name.startswith(f"{place}/")}
    ego_T_lidar, world_T_ego = (
        from_row(dict(rotation=own[f"{name}_rotation"], translation=own[f"{name}_translation"]))
        for name in ("lidar2ego", "ego2global")
    )
    kept = own["cls_scores"] >= 0.2 if task == "tracking" else np.ones(len(own["cls_scores"]), dtype=bool)
    names = [CLASSES[label] for label in own["labels_3d"][kept]]
    ids = own["instance_ids"][kept] if task == "tracking" else None
    boxes, scores = own["boxes_3d"][kept, :9], own["scores_3d"][kept]
    return result_rows(token, boxes, names, scores, world_T_ego @ ego_T_lidar, ids, ego_T_lidar, CLASS_RANGES)


@pytest.mark.parametrize("task", ["detection", "tracking"])
@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.name)
def test_rows(golden, task):
    inputs, expected = golden.load("inputs"), json.loads((golden.folder / f"{task}.json").read_text())
    assert expected
    for place, (token, theirs) in enumerate(sorted(expected.items())):
        ours = written(inputs, token, place, task)
        theirs = sorted(theirs, key=lambda row: -row[f"{task}_score"])
        assert len(ours) == len(theirs) > 0
        for mine, their in zip(ours, theirs):
            assert mine.keys() == their.keys()
            if task == "tracking":
                assert f"tensor({mine.pop('tracking_id')})" == their.pop("tracking_id")
            sign = np.sign(np.dot(mine["rotation"], their["rotation"]))  # q and −q turn alike
            mine["rotation"] = (sign * np.array(mine["rotation"])).tolist()
            for name, value in their.items():
                if isinstance(value, str):
                    assert mine[name] == value
                else:
                    assert mine[name] == pytest.approx(value, rel=1e-6, abs=2e-6), name
