"""Key frames for the detector: what is in them, augmentation against geometry, and broken files."""

import json
import math
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rigfuse.modules.detection.boxes import DETECTION_CLASSES, move_boxes
from rigfuse.train.data import open_drives
from rigfuse.train.data.bev import BevAugmentation
from rigfuse.train.data.dataset import cover
from rigfuse.train.data.images import augment_image
from rigfuse.train.systems.cmt_aqr.data import ClassBalance, DetectionConfig, DetectionSamples, build_detection, collate

FAR = (-200.0, -200.0, -50.0, 200.0, 200.0, 50.0)
SMALL = DetectionConfig(image_size=(16, 40), sweeps=3)
PLAIN = replace(SMALL, cbgs=False, p_no_image=0.0, p_no_lidar=0.0, sampled_epochs=0)


@pytest.fixture(scope="module")
def drives(small_world):
    return open_drives(small_world)


@pytest.fixture
def altered(small_world, tmp_path):
    """A copy to break. Files are linked, so what is changed has to be unlinked first."""
    return shutil.copytree(small_world, tmp_path / "altered", copy_function=os.link)


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content)


def same(a, b):
    tensors = [(a.images, b.images), (a.image_T_ego, b.image_T_ego), *zip(a.points, b.points), *zip(a.labels, b.labels)]
    boxes = all(torch.equal(x.nan_to_num(99), y.nan_to_num(99)) for x, y in zip(a.boxes, b.boxes))
    return boxes and a.tokens == b.tokens and all(torch.equal(x, y) for x, y in tensors)


def count_inside(points, boxes):
    """(G,): how many points (P, 3) are in each of the boxes (G, 9)."""
    offset = points[None, :, :3] - boxes[:, None, :3]
    cos, sin = boxes[:, 6:7].cos(), boxes[:, 6:7].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    aside = offset[..., 1] * cos - offset[..., 0] * sin
    local = torch.stack([along, aside, offset[..., 2]], dim=-1).abs()
    return (local <= boxes[:, None, 3:6] / 2).all(-1).sum(1)


def detection_class(box):
    from nuscenes.eval.detection.utils import category_to_detection_name

    return category_to_detection_name(box.category)


def test_targets_have_class_range_and_points(drives):
    config = replace(PLAIN, point_range=(-30.0, -25.0, -3.0, 30.0, 25.0, 5.0))
    moment = drives[0][1]
    counts = [0, None, 1]  # none, unknown, one
    moment = replace(moment, boxes=[replace(box, num_points=counts[i % 3]) for i, box in enumerate(moment.boxes)])
    for training in (False, True):
        samples = DetectionSamples(drives[:1], config, training)
        boxes, labels = samples.targets(moment)
        expected = []
        for box in moment.ego_boxes:
            x, y, z = box.center.tolist()
            inside = abs(x) < 30 and abs(y) < 25 and -3 <= z < 5
            if detection_class(box) and inside and (box.num_points != 0 or not training):
                expected.append((detection_class(box), x, y, z, *box.size))
        assert [DETECTION_CLASSES[label] for label in labels] == [row[0] for row in expected]
        torch.testing.assert_close(boxes[:, :6], torch.tensor([row[1:] for row in expected]))
        assert 5 < len(boxes) < len(moment.boxes) - 5
    assert samples.targets(replace(moment, boxes=()))[0].shape == (0, 9)


# ---- augmentation


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_points_stay_in_their_boxes_under_bev_augmentation(drives, flips):
    item = DetectionSamples(drives[1:], replace(PLAIN, point_range=FAR, sweeps=1), training=False)[0, 2]
    bev = BevAugmentation(0.35, 1.04, *flips)
    points, boxes = item.points[0][::5].double(), item.boxes[0].double()
    moved = bev.boxes(boxes)
    before, after = count_inside(points, boxes), count_inside(bev.points(points), moved)
    assert before.max() > 50 and (before - after).abs().max() <= 1
    turned = replace(bev, rotation=0.45)  # and not in those of another turn
    assert (before - count_inside(turned.points(points), moved)).abs().max() > 50
    later = boxes.clone()
    later[:, :2] += 0.7 * boxes[:, 7:]
    known = boxes.isfinite().all(1)
    expected = bev.boxes(later)[known, :2] - moved[known, :2]
    torch.testing.assert_close(0.7 * moved[known, 7:], expected)
    assert (boxes[known, 7:].norm(dim=1) > 1).any()
    torch.testing.assert_close(bev.matrix[:3, :3] @ points[5, :3], bev.points(points)[5, :3])


def test_bev_augmentation_mirrors_then_turns_then_scales():
    quarter = BevAugmentation(math.pi / 2, 2.0, flip_x=True)  # (1, 2) → (−1, 2) → (−2, −1) → (−4, −2)
    moved = quarter.points(torch.tensor([[1.0, 2.0, 3.0, 0.5, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([[-4.0, -2.0, 6.0, 0.5, 0.1]], dtype=torch.float64))
    assert torch.equal(BevAugmentation(flip_y=True).matrix, torch.tensor([1.0, -1, 1, 1]).double().diag())


def test_augmented_projections_see_boxes_where_they_were(drives):
    config = replace(PLAIN, point_range=FAR, sweeps=1, flip=True, rotation=5.0)
    samples = DetectionSamples(drives[1:], config, training=True, seed=5)
    rig, drawn = samples.moment(1).rig, []
    plain = samples.targets(samples.moment(1))[0]
    inside, plain = count_inside(samples.moment(1).points(), plain), plain[:, :3].double()
    for epoch in range(6):
        item = samples[epoch, 1]
        view, bev, *_ = samples.draw(np.random.default_rng((5, epoch, 1)))
        drawn.append((view["flip"], bev.flip_x, bev.flip_y))
        assert not torch.allclose(item.boxes[0][:, :3].double(), plain, atol=0.1)
        assert (count_inside(item.points[0], item.boxes[0]) - inside).abs().max() < 20 < inside.max() / 10
        for place, camera in enumerate(rig.cameras):
            pixels, depth = project(item.image_T_ego[0, place], item.boxes[0][:, :3].double())
            was, was_depth = project(camera.image_T_ego, plain)
            ahead = was_depth > 1
            turn = cover(camera.width, camera.height, (16, 40), **view).matrix(camera.width, camera.height)
            expected = torch.cat([was, torch.ones(len(was), 1)], dim=1) @ turn.T
            torch.testing.assert_close(depth, was_depth, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(pixels[ahead], expected[ahead, :2], rtol=1e-4, atol=1e-3)
    assert all(len(set(flips)) == 2 for flips in zip(*drawn))


def project(image_T_ego, points):
    scaled = points @ image_T_ego[:3, :3].T + image_T_ego[:3, 3]
    return scaled[:, :2] / scaled[:, 2:], scaled[:, 2]


def test_points_outside_the_range_are_left_out_after_the_augmentation(drives):
    config = replace(PLAIN, point_range=(-20.0, -10.0, -1.0, 30.0, 10.0, 2.0))
    whole = DetectionSamples(drives, replace(config, point_range=FAR), training=True)
    for epoch in range(3):
        points, kept = whole[epoch, 0].points[0], DetectionSamples(drives, config, training=True)[epoch, 0].points[0]
        x, y, z = points[:, :3].unbind(1)
        inside = (x >= -20) & (x < 30) & (y >= -10) & (y < 10) & (z >= -1) & (z < 2)
        assert torch.equal(kept, points[inside]) and 0 < inside.sum() < len(points)


def test_modalities_are_masked_at_their_rates(drives):
    config = replace(SMALL, cbgs=False, p_no_image=0.3, p_no_lidar=0.2)
    samples = DetectionSamples(drives, config, training=True)
    draws = [samples.draw(np.random.default_rng((0, epoch, 0)))[2:] for epoch in range(2000)]
    images, points = np.array(draws).T
    assert abs((~images).mean() - 0.3) < 0.04 and abs((~points).mean() - 0.2) < 0.04 and (images | points).all()
    blind = samples[next(epoch for epoch in range(2000) if not images[epoch]), 0]
    deaf = samples[next(epoch for epoch in range(2000) if not points[epoch]), 0]
    assert blind.images.max() == 0 and len(blind.points[0]) > 1000 and len(blind.boxes[0])
    assert deaf.images.float().std() > 10 and deaf.points[0].shape == (0, 5) and len(deaf.boxes[0])
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(blind.to("cpu").images[0, 3, :, 5, 7], black)


def test_evaluation_changes_nothing(drives):
    samples = DetectionSamples(drives, SMALL, training=False)
    item, moment = samples[3, 4], drives[1][1]
    assert len(samples) == 6 and same(item, samples[0, 4]) and item.tokens == [moment.token]
    turn = cover(64, 36, (16, 40))
    assert torch.equal(item.image_T_ego[0], moment.rig.augmented(turn).image_T_ego)
    with Image.open(moment.image_path("CAM_BACK")) as image:
        expected = torch.from_numpy(np.array(augment_image(image, turn))).permute(2, 0, 1)
    assert torch.equal(item.images[0, 5], expected)


# ---- what an item depends on


def test_an_item_depends_on_seed_epoch_and_index_alone(drives):
    samples = DetectionSamples(drives, SMALL, training=True, seed=3)
    keys = [(0, 5), (0, 6), (1, 5), (2, 7)]
    first = [samples[key] for key in keys]
    torch.rand(3), np.random.rand()
    again = pickle.loads(pickle.dumps(samples))
    assert all(same(item, again[key]) for item, key in zip(first, keys))
    loader = DataLoader(samples, sampler=keys, num_workers=2, collate_fn=collate)
    assert all(same(item, other) for item, other in zip(first, loader))
    assert not same(first[0], first[2])
    assert not same(first[0], DetectionSamples(drives, SMALL, training=True, seed=4)[0, 5])


def test_classes_are_drawn_equally_often():
    labels = [torch.tensor([0, 0, 0])] * 90 + [torch.tensor([4, 0])] * 9 + [torch.tensor([7])] + [torch.tensor([])] * 5
    balance = ClassBalance(labels)
    assert len(balance) == (99 + 9 + 1) // 3 * 3
    draws = [balance.draw(np.random.default_rng(epoch)) for epoch in range(50)]
    assert all(len(draw) == len(balance) and max(draw) < 100 for draw in draws)
    share = np.bincount(np.concatenate(draws), minlength=105) / (50 * len(balance))
    assert share[99] == pytest.approx(1 / 3) and share[100:].sum() == 0
    assert share[90:99].sum() == pytest.approx(1 / 3 + 1 / 3 * 9 / 99, abs=0.02)
    with pytest.raises(ValueError, match="cbgs: none of 2 samples has an object of the ten classes in range"):
        ClassBalance([torch.tensor([], dtype=torch.int64)] * 2)


def test_the_resampled_order_depends_on_seed_and_epoch(drives):
    samples = DetectionSamples(drives, SMALL, training=True)
    orders = [samples.order(epoch) for epoch in (0, 1, 0)]
    assert len(samples) == len(orders[0]) > 6 and orders[0] == orders[2] != orders[1]
    assert samples[0, 9].tokens == [samples.moment(orders[0][9]).token]


def test_a_batch_has_every_part(drives):
    samples = DetectionSamples(drives, PLAIN, training=True)
    batch = collate([samples[0, 0], samples[0, 5]])
    assert batch.images.shape == (2, 6, 3, 16, 40) and batch.images.dtype == torch.uint8
    given = batch.to("cpu")
    assert given.images.dtype == torch.float32 and given.images.abs().max() < 3
    assert given.image_T_ego.shape == (2, 6, 4, 4) and given.image_T_ego.dtype == torch.float64
    for points, boxes, labels in zip(given.points, given.boxes, given.labels, strict=True):
        assert points.dtype == boxes.dtype == torch.float32 and labels.dtype == torch.int64
        assert points.shape[1:] == (5,) and boxes.shape == (len(labels), 9) and len(labels)
    assert given.tokens == [samples.moment(0).token, samples.moment(5).token]


# ---- broken files, refusals


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "earlier truncated"])
def test_a_broken_file_is_named_and_its_sample_replaced(altered, damage):
    samples = DetectionSamples(open_drives(altered), PLAIN, training=False)
    moment = samples.moment(2)
    path = moment.sweeps(3)[1 if "earlier" in damage else 0].path
    if damage == "missing":
        path.unlink()
    else:
        rewrite(path, b"" if damage == "empty" else path.read_bytes()[:-7])
    item = samples[0, 2]
    assert item.bad_files == [str(path)] and item.tokens != [moment.token]
    assert same(item, samples[0, 2]) and samples[0, 0].bad_files == []
    assert collate([samples[0, 0], item]).bad_files == [str(path)]


def test_a_missing_earlier_scan_is_left_out(altered):
    samples = DetectionSamples(open_drives(altered), replace(PLAIN, point_range=FAR), training=False)
    before = samples[0, 2]
    sweeps = samples.moment(2).sweeps(3)
    sweeps[1].path.unlink()
    after = samples[0, 2]
    lags = before.points[0][:, 4]
    assert after.bad_files == [] and torch.equal(after.points[0], before.points[0][(lags - sweeps[1].lag).abs() > 0.01])
    assert len(after.points[0]) < len(before.points[0])


def test_a_root_without_scans_is_refused(altered):
    for path in (altered / "samples" / "LIDAR_TOP").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"altered: 3 of 3 samples looked at lack images or LiDAR scans; .*--out"):
        build_detection(replace(SMALL, root=str(altered)), seed=0)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname"])
def test_a_scan_cannot_leave_the_root(altered, name):
    table = altered / "v1.0-mini" / "sample_data.json"
    rows = json.loads(table.read_text())
    next(row for row in rows if "sweeps/LIDAR_TOP" in row["filename"])["filename"] = name
    rewrite(table, json.dumps(rows).encode())
    with pytest.raises(ValueError, match=f"filename is '{name}', needs the name of a file that stays in the root"):
        open_drives(altered)


def test_splits_come_from_the_world(small_world):
    training, validation = build_detection(replace(SMALL, root=str(small_world)), seed=0)
    assert [drive.name for drive in training.drives] == ["world-0000"] and training.training
    assert [drive.name for drive in validation.drives] == ["world-0001"] and not validation.training
    assert len(validation) == 3 and not math.isnan(training[0, 0].images.float().mean())


def test_refusals_are_one_line_that_says_what_to_do(drives):
    with pytest.raises(ValueError, match=r"^data.root is empty.*make_world.py --out FOLDER, then --data FOLDER$"):
        build_detection(SMALL, seed=0)
    for name, value, needed in (
        ("sweeps", 0, "1 or more"),
        ("point_range", (0.0, 0.0, 0.0, 1.0, 0.0, 1.0), "three lows"),
        ("bev_scale", (0.0, 1.0), "two factors"),
        ("p_no_image", 0.8, "with p_no_lidar"),
    ):
        with pytest.raises(ValueError, match=f"data.{name} is .*, needs .*{needed}"):
            DetectionSamples(drives, replace(SMALL, **{name: value}), training=True)


def test_the_lidar_frame_is_the_same_scene(drives):
    """Boxes come back to where they were, and a camera sees a point where it saw it."""
    ego, lidar = (
        DetectionSamples(drives[1:], replace(PLAIN, point_range=FAR, frame=frame), training=False)[0, 1]
        for frame in ("ego", "lidar")
    )
    ego_T_frame = lidar.ego_T_frame[0]
    assert torch.equal(ego.ego_T_frame[0], torch.eye(4).double()) and not torch.equal(ego_T_frame, ego.ego_T_frame[0])
    back = move_boxes(lidar.boxes[0], ego_T_frame)
    torch.testing.assert_close(back, ego.boxes[0], rtol=1e-4, atol=1e-3, equal_nan=True)
    points = lidar.points[0][:, :3].double() @ ego_T_frame[:3, :3].T + ego_T_frame[:3, 3]
    torch.testing.assert_close(points.float(), ego.points[0][:, :3], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lidar.image_T_ego[0], ego.image_T_ego[0] @ ego_T_frame)
