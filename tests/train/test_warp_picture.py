"""On real images: a static object's past, warped at its true depth, is its present."""

import pytest
import torch
from PIL import Image

from rigfuse.modules.rig import Camera
from rigfuse.train.data import Box, builtin_drives, open_drives
from rigfuse.train.data.warp_picture import draw_warps, similarity, static_objects, surface_depth, warp_to_object
from support.roots import copy_root

EYE = torch.eye(4, dtype=torch.float64)


def objects(drives, count):
    found = [item for drive in drives if drive.name in ("scene-0103", "ddad-02") for item in static_objects(drive)]
    assert len(found) == count
    return found


def check(item, source=None):
    view = warp_to_object(*item, source=source)
    assert view.similarity > 0.4
    assert view.similarity > view.similarity_without_warp + 0.1
    for factor in (0.5, 0.7, 1.4, 2.0):
        assert view.similarity > warp_to_object(*item, source=source, depth_factor=factor).similarity + 0.05, factor


def test_nuscenes_half_a_second_later(nuscenes):
    (item,) = objects(nuscenes, 1)
    past, now, camera, box = item
    assert (past.scene, camera, box.category) == ("scene-0103", "CAM_FRONT", "human.pedestrian.adult")
    assert torch.dist(past.world_T_ego[:3, 3], now.world_T_ego[:3, 3]) > 4
    check(item)
    check(item, source="CAM_FRONT_LEFT")  # a neighbour's past serves as well


def test_ddad_a_parked_car(ddad):
    for item in objects(ddad, 2):
        assert item[2] == "CAM_FRONT_RIGHT" and item[3].category == "vehicle.car"
        check(item)


def test_the_picture(ddad, tmp_path):
    views = draw_warps(ddad, tmp_path / "warp.png")
    assert len(views) == 1 and (tmp_path / "warp.png").stat().st_size > 100_000
    assert views[0].title.startswith("ddad-02, CAM_FRONT_RIGHT from CAM_FRONT_RIGHT 0.1 s before: vehicle.car at ")
    assert draw_warps(builtin_drives(1, 3), tmp_path / "none.png") == []
    assert not (tmp_path / "none.png").exists()


def test_pictures_smaller_than_the_tables_say_are_warped_as_well(ddad, ddad_root, tmp_path):
    root = copy_root(ddad_root, tmp_path / "root")
    for file in (root / "samples").rglob("*.jpg"):
        with Image.open(file) as image:
            smaller = image.resize((image.width // 2, image.height // 2))
        file.unlink()
        smaller.save(file, quality=95)
    (whole,), (half,) = draw_warps(ddad, tmp_path / "a.png"), draw_warps(open_drives(root), tmp_path / "b.png")
    assert half.present.shape == whole.present.shape and half.inside.equal(whole.inside)
    assert half.similarity > whole.similarity - 0.02 and half.similarity > half.similarity_without_warp + 0.1


def test_surface_depth_of_a_box_ahead():
    axes = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    camera = Camera("CAM", 101, 81, [[50, 0, 50], [0, 50, 40], [0, 0, 1]], axes)
    pose = EYE.clone()
    pose[0, 3] = 12
    depth = surface_depth(camera, Box("a", "car", pose, (4, 2.1, 1.1)))  # its back is 10 m ahead
    hit = depth.isfinite()
    assert depth[hit].unique() == pytest.approx(10)
    assert hit[40].nonzero().flatten().tolist() == list(range(45, 56))  # 50 ± 1.05 m · 50 / 10 m
    assert hit[:, 50].nonzero().flatten().tolist() == list(range(38, 43))


def test_similarity():
    image, inside = torch.rand(3, 9, 9), torch.rand(9, 9) < 0.7
    assert similarity(image, 0.3 * image + 0.1, inside) == pytest.approx(1)
    assert similarity(image, -image, inside) == pytest.approx(-1)
    assert abs(similarity(torch.rand(3, 99, 99), torch.rand(3, 99, 99), torch.ones(99, 99) > 0)) < 0.1
