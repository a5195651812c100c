"""Windows over drives: what is in them, what they depend on, and what happens to broken files."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rigfuse.modules.rig import ImageAugmentation
from rigfuse.train.data.dataset import cover
from rigfuse.train.data.drive import builtin_drives
from rigfuse.train.data.moments import Drive
from rigfuse.train.data.painted import paint
from rigfuse.train.data.splits import split_names
from rigfuse.train.data.windows import WindowConfig, Windows, build_windows, collate

NUSCENES = Path(__file__).parents[2] / ".." / "shared" / "data" / "nuscenes"
SMALL = WindowConfig(image_size=(32, 64), history=2, future=4, scenes=(2, 1))
DRAWN = replace(SMALL, resize=(1.0, 1.3), flip=True, rotation=5.0)


def drive_with_files(folder, moments=5):
    """The built-in drive through cameras of 160×90, its pictures in files."""
    source = builtin_drives(scenes=1, length=moments)[0]
    made = []
    for index, moment in enumerate(source):
        rig = moment.rig.augmented(ImageAugmentation(resize=0.1))
        images = {}
        for camera in rig.cameras:
            images[camera.name] = folder / f"{index}-{camera.name}.png"
            Image.fromarray(paint(camera, moment.world_T_ego).permute(1, 2, 0).numpy()).save(images[camera.name])
        made.append(replace(moment, rig=rig, images=images, token=f"sample-{index}"))
    return Drive("files", moments, made.__getitem__)


def same(a, b):
    geometry = zip(a.frames, b.frames)
    return torch.equal(a.images, b.images) and all(torch.equal(x.image_T_ego, y.image_T_ego) for x, y in geometry)


def test_a_window_has_every_part():
    training, validation = build_windows(SMALL, seed=0)
    assert len(training) == 2 * 38 and len(validation) == 38
    assert {d.name for d in training.drives}.isdisjoint(d.name for d in validation.drives)
    batch = collate([training[0, 0], training[0, 50]])
    assert batch.images.shape == (2, 3, 6, 3, 32, 64) and batch.images.dtype == torch.uint8
    assert len(batch.frames) == 3 and batch.frames[0].scene == ("drive-0000", "drive-0001")
    times = torch.stack([frame.timestamp for frame in batch.frames])
    torch.testing.assert_close(times.diff(dim=0), torch.full((2, 2), 0.5, dtype=torch.float64), rtol=0, atol=0.02)
    window = batch.to("cpu")
    assert window.images.dtype == torch.float32 and window.images.abs().max() < 3
    grey = (0.485 * 255 - batch.images[..., 0, :, :]).abs().argmin()  # the pixel next to the mean
    assert window.images[..., 0, :, :].flatten()[grey].abs() < 0.02


def test_an_item_depends_on_seed_epoch_and_index_alone():
    drives = builtin_drives(scenes=2)
    windows = Windows(drives, DRAWN, training=True, seed=3)
    first = windows[0, 5]
    windows[0, 6], torch.rand(3)
    assert same(first, windows[0, 5]) and same(first, pickle.loads(pickle.dumps(windows))[0, 5])
    assert not same(first, windows[1, 5]) and not same(first, Windows(drives, DRAWN, True, seed=4)[0, 5])
    plain = Windows(drives, DRAWN, training=False)
    assert same(plain[0, 5], plain[1, 5])
    unmoved = replace(SMALL, image_size=(32, 48), shift=False)
    keeps = Windows(drives, replace(unmoved, remember=9), training=True)
    for index in (5, 6, 5):
        assert same(keeps[index, index], Windows(drives, unmoved, training=False)[0, index])
    assert keeps._images.cache_info().misses == 4  # three moments, and one more


def test_augmentation_is_folded_into_the_projection(tmp_path):
    """A file's augmented picture is what a camera with the augmented projection would paint."""
    drive = drive_with_files(tmp_path, moments=3)
    windows = Windows([drive], replace(DRAWN, image_size=(64, 112)), training=True, seed=1)
    drawn = ImageAugmentation()
    for epoch in range(4):
        window = windows[epoch, 0]
        for camera in range(6):
            name = drive[2].rig.names[camera]
            drawn = cover(160, 90, (64, 112), **windows.draw_view(windows_rng(windows, epoch)))
            there = drive[2].rig[name].augmented(drawn)
            torch.testing.assert_close(window.frames[2].image_T_ego[0, camera], there.image_T_ego)
            expected = paint(there, drive[2].world_T_ego).float()
            inside = (slice(None), slice(16, -8), slice(16, -16))  # rotation turns the black outside into the corners
            picture = window.images[0, 2, camera].float()
            error = (picture - expected)[inside].abs().mean()
            shifted = (picture.roll(6, dims=2) - expected)[inside].abs().mean()
            assert error < 0.55 * shifted and error < 30, (epoch, name, float(error), float(shifted))
    assert drawn.rotation != 0 and drawn.crop[2:] == (112, 64)


def windows_rng(windows, epoch):
    return np.random.default_rng((windows.seed, epoch, 0))


def test_the_crop_keeps_the_bottom_and_never_leaves_the_image():
    for size in ((256, 704), (900, 1600), (96, 160)):
        for across in (0.0, 0.5, 1.0):
            augmentation = cover(1600, 900, size, factor=1.2, across=across)
            left, top, width, height = augmentation.crop
            resized = augmentation.resized(1600, 900)
            assert (height, width) == size and left >= 0 and top >= 0
            assert left + width <= resized[0] and top + height == resized[1]
    assert cover(1600, 900, (900, 1600)).matrix(1600, 900).equal(torch.eye(3, dtype=torch.float64))


def test_the_trajectory_is_the_future_in_the_present_frame():
    windows = Windows(builtin_drives(scenes=1), SMALL, training=False)
    trajectory = windows[0, 10].trajectory[0]
    poses = [windows.drives[0][12 + step].world_T_ego for step in range(5)]
    travelled = torch.stack([torch.dist(a[:2, 3], b[:2, 3]) for a, b in zip(poses, poses[1:])]).float()
    steps = torch.cat([torch.zeros(1, 2), trajectory]).diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, travelled)
    assert trajectory[0, 0] > 0.9 * travelled[0]  # forward is x
    final = windows[0, len(windows) - 1].trajectory[0]
    torch.testing.assert_close(final, torch.zeros_like(final), atol=1e-9, rtol=0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no image", "another shape"])
def test_a_broken_file_is_named_and_its_window_replaced(tmp_path, damage):
    drive = drive_with_files(tmp_path)
    windows = Windows([drive], SMALL, training=False)
    assert len(windows) == 3 and windows[0, 2].bad_files == []
    path = drive[4].images["CAM_BACK"]  # only in the last window
    if damage == "missing":
        path.unlink()
    elif damage == "another shape":
        Image.new("RGB", (80, 60)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:500] if damage == "truncated" else b"not a picture")
    window = windows[0, 2]
    assert window.bad_files == [str(path)]
    assert window.tokens[0] in ("sample-2", "sample-3") and same(window, windows[0, 2])
    assert windows[0, 0].bad_files == [] and collate([window, windows[0, 0]]).bad_files == [str(path)]


def test_nothing_whole_is_a_clear_stop(tmp_path):
    drive = drive_with_files(tmp_path, moments=3)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no whole sample .*missing or broken: .*CAM_FRONT.png"):
        Windows([drive], SMALL, training=False)[0, 0]
    for history, needed in ((4, "5 moments in a row"), (0, "a moment")):
        with pytest.raises(ValueError, match=f"none of . scenes has {needed}"):
            Windows([drive] if history else [], replace(SMALL, history=history), training=False)


def test_one_world_point_looks_the_same_at_every_moment():
    """The painted drive is fixed to the world: places ahead keep their colours half a second and a second later."""
    drive = builtin_drives(scenes=1)[0]
    ahead = torch.tensor([[16.0 + 0.3 * step, 0.0, 0.0, 1.0] for step in range(20)], dtype=torch.float64)
    points = ahead @ drive[0].world_T_ego.T
    seen = []
    for moment in drive[:3]:
        camera = moment.rig["CAM_FRONT"].augmented(ImageAugmentation(crop=(500, 450, 600, 300)))
        u, v, depth, _ = (points @ torch.linalg.inv(moment.world_T_ego).T @ camera.image_T_ego.T).unbind(1)
        column, row = (u / depth).round().long(), (v / depth).round().long()
        seen.append(paint(camera, moment.world_T_ego)[:, row, column].int())
    for later in seen[1:]:
        kept = (later - seen[0]).abs().amax(dim=0) <= 2
        assert kept.float().mean() > 0.7  # the others are on the edge of a patch


def test_a_generated_world_names_its_own_splits(tmp_path):
    pytest.importorskip("nuscenes")
    (tmp_path / "v1.0-mini").mkdir()
    (tmp_path / "v1.0-mini" / "sample_data.json").write_text("[]")
    own = dict(world_train=["a", "b"], world_val=["c"], world_all=["a", "b", "c"])
    (tmp_path / "v1.0-mini" / "splits.json").write_text(json.dumps(own))
    config = replace(SMALL, root=str(tmp_path))
    assert split_names(config) == ("world_train", "world_val")
    assert split_names(replace(config, val_split="mini_val")) == ("world_train", "mini_val")


@pytest.mark.skipif(not NUSCENES.is_dir(), reason="the shared nuScenes data is not here")
def test_real_tables_are_split_by_scene(monkeypatch):
    config = replace(SMALL, root=str(NUSCENES))
    with pytest.raises(ValueError, match=r"20 of 20 samples looked at lack images; .*make_world.py --over"):
        build_windows(config, seed=0)
    monkeypatch.setattr(Windows, "check_files", lambda windows: None)
    training, validation = build_windows(config, seed=0)
    assert sorted(d.name for d in validation.drives) == ["scene-0103", "scene-0916"] and len(training.drives) == 8
    with pytest.raises(ValueError, match="data.val_split is 'mini_vall'; did you mean 'mini_val'"):
        build_windows(replace(config, val_split="mini_vall"), seed=0)
    with pytest.raises(ValueError, match="scenes in both splits"):
        build_windows(replace(config, train_split="mini_val"), seed=0)
