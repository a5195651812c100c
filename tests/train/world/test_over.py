"""Pictures drawn over real nuScenes geometry, where the real data is at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rigfuse.train.world import draw_over, read_depth


@pytest.fixture(scope="session")
def over(tmp_path_factory, nuscenes_root):
    out = tmp_path_factory.mktemp("over") / "drawn"
    draw_over(nuscenes_root, out, scenes=["scene-0061"], samples=2, workers=0)
    return out


def test_missing_pictures_are_drawn_over_real_geometry(over, nuscenes_root):
    provenance = json.loads((over / "provenance.json").read_text())
    assert len(provenance["real"]) == 24 and len(provenance["drawn"]) == 6
    assert len(provenance["absent"]) == 404 * 6 - 30
    for name in provenance["real"]:
        assert (over / name).read_bytes() == (nuscenes_root / name).read_bytes()
    for name in provenance["drawn"]:
        with Image.open(over / name) as image:
            assert image.size == (1600, 900) and np.asarray(image).std() > 25


def test_drawn_boxes_stand_where_they_are_annotated(over):
    nusc = pytest.importorskip("nuscenes").NuScenes("v1.0-mini", str(over), verbose=False)
    sample = nusc.get("sample", nusc.get("sample", nusc.scene[0]["first_sample_token"])["next"])
    checked = 0
    for channel in ("CAM_FRONT", "CAM_FRONT_RIGHT"):
        row = nusc.get("sample_data", sample["data"][channel])
        depth = read_depth(over / "depth" / channel / Path(row["filename"]).with_suffix(".png").name)
        _, boxes, intrinsics = nusc.get_sample_data(row["token"])
        for found in boxes:
            still = np.linalg.norm(nusc.box_velocity(found.token)) < 0.1
            if still and 5 < found.center[2] < 30 and found.name.startswith(("vehicle.car", "movable_object.barrier")):
                u, v = np.rint((intrinsics @ found.center)[:2] / found.center[2]).astype(int)
                if 0 <= u < 1600 and 0 <= v < 900:
                    assert depth[v, u] < found.center[2] + 0.2, found.name
                    checked += abs(depth[v, u] - found.center[2]) < max(found.wlh) / 2 + 0.1
    assert checked >= 5
