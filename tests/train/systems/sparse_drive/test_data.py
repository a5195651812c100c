"""Windows for the driving model: truth against later moments, sizes, whole scenes for a rank."""

from dataclasses import replace

import pytest
import torch

from rigfuse.modules.sparse_drive.bank import Link
from rigfuse.train.data.driving_truth import DrivingTruth
from rigfuse.train.data.map_truth import MAP_CLASSES
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.anchors import find_anchors, read_anchors, write_anchors
from rigfuse.train.systems.sparse_drive.data import DrivingSamples, build_driving, collate, ego_status
from rigfuse.train.systems.sparse_drive.model import focal_lengths


@pytest.fixture(scope="module")
def settings(small_world, tmp_path_factory):
    made = experiment("sparsedrive_small_stage2_tiny")
    made.data.root, made.data.cache = str(small_world), str(tmp_path_factory.mktemp("cache"))
    made.data.image_size = (36, 64)  # of which the maps are padded to 48 × 64
    return made


@pytest.fixture(scope="module")
def sets(settings):
    return build_driving(settings.data, settings.model, 0)


def test_futures_lead_to_where_later_moments_are(settings, sets):
    """Of boxes, and of the ego vehicle; in the ego frame of the present, each step from the one before."""
    training = sets[0]
    moments = list(training.drives[0])
    driving = DrivingTruth.from_arrays(training.truth[moments[0].token])
    truth = training.targets(moments[0], driving, torch.zeros(10))
    places = truth.boxes[0][:, None, :2] + truth.futures[0].cumsum(1)
    moved = 0
    for step in (0, 1):
        then = [box.moved(torch.linalg.inv(moments[0].world_T_ego)) for box in moments[step + 1].boxes]
        centres = torch.stack([box.center[:2] for box in then]).float()
        known = truth.future_known[0][:, step]
        apart = (places[known, step, None] - centres).norm(dim=-1).min(1).values
        assert known.sum() > 5 and apart.max() < 1e-3
        moved += (truth.futures[0][known, step].norm(dim=1) > 1).sum()
    assert moved > 0 and not truth.future_known[0][:, 2:].any()
    way = truth.ego_future[0].cumsum(0)
    now_T_world = torch.linalg.inv(moments[0].world_T_ego)
    expected = torch.stack([(now_T_world @ later.world_T_ego)[:2, 3] for later in moments[1:]]).float()
    torch.testing.assert_close(way[:2], expected, atol=1e-4, rtol=0)
    assert truth.ego_future_known[0].tolist() == [True, True, False, False, False, False]


def test_lines_have_the_classes_of_the_head_and_all_their_orders(settings, sets):
    training, head = sets[0], settings.model.head
    moment = training.moment(0)
    driving = DrivingTruth.from_arrays(training.truth[moment.token])
    truth = training.targets(moment, driving, torch.zeros(10))
    lines, labels = truth.lines[0], truth.line_labels[0]
    assert lines.shape == (len(driving.map.lines), 2 * (head.lines.points - 1), head.lines.points, 2)
    assert [head.line_classes[label] for label in labels] == [MAP_CLASSES[label] for label in driving.map.labels]
    assert {head.line_classes[label] for label in labels} == set(MAP_CLASSES)
    for line, label, whole in zip(lines, labels, driving.map.lines):
        ends = torch.from_numpy(whole[[0, -1]]).float()
        torch.testing.assert_close(line[0, [0, -1]], ends, atol=1e-4, rtol=0)
        if head.line_classes[label] == "ped_crossing" and torch.equal(*ends):
            assert (line.abs() < 1e3).all()  # every order of a closed line is one


def test_only_near_boxes_with_points_are_learned(settings, sets):
    training = sets[0]
    moment = training.moment(0)
    driving = DrivingTruth.from_arrays(training.truth[moment.token])
    boxes = training.targets(moment, driving, torch.zeros(10)).boxes[0]
    near = DrivingSamples(
        training.drives, replace(settings.data, box_distance=20.0), True, 0, settings.model, training.truth
    )
    nearer = near.targets(moment, driving, torch.zeros(10)).boxes[0]
    torch.testing.assert_close(nearer, boxes[boxes[:, :2].norm(dim=1) <= 20])
    assert 0 < len(nearer) < len(boxes)
    empty = replace(moment, boxes=tuple(replace(box, num_points=0) for box in moment.boxes))
    assert training.targets(empty, driving, torch.zeros(10)).boxes[0].shape == (0, 9)


def test_an_item_fits_the_model(settings, sets):
    training, validation = sets
    item = training[0, 0]
    assert item.images.shape == (1, 2, 6, 3, 36, 64) and len(item.frames) == 2 and not item.others
    assert [tuple(level.shape) for level in item.depth] == [(1, 6, 6, 8), (1, 6, 3, 4)]
    assert all((level > 0).any() for i, level in enumerate(item.depth))
    assert not any((level[:, :, 5:] > 0).any() for i, level in enumerate(item.depth))  # the padding
    rig = training.moment(0).rig
    scale = 64 / rig.cameras[0].width
    expected = torch.tensor([camera.intrinsics[0, 0] * scale for camera in rig.cameras])
    torch.testing.assert_close(focal_lengths(item.frames[-1])[0], expected.float(), rtol=1e-4, atol=1e-4)

    first, last = validation[0, 0], validation[0, 2]
    assert first.images.shape[1] == 1 and first.order == [0] and last.order == [2] and not first.depth
    assert len(first.others[0]) == 6 and len(first.others[0][0]) > 0 and first.velocity.isnan().all()
    both = collate([first, last]).to("cpu")
    assert both.tokens == first.tokens + last.tokens and len(both.truth.boxes) == 2
    torch.testing.assert_close(both.truth.ego_future[1:], last.truth.ego_future)
    torch.testing.assert_close(both.frames[0].world_T_ego[1:], last.frames[0].world_T_ego)


def test_some_training_samples_begin_a_drive(settings, sets):
    training = sets[0]
    continues = []
    for share in (0.0, 1.0):
        config = replace(settings.data, p_no_history=share)
        samples = DrivingSamples(training.drives, config, True, 0, settings.model, training.truth)
        then, now = samples[0, 1].frames
        continues.append(bool(Link.between(then, now, max_gap=2.0, standard=0.5, device="cpu").any))
    assert continues == [True, False]


def test_a_rank_evaluates_whole_scenes(settings, sets):
    both = DrivingSamples(
        [*sets[0].drives, *sets[1].drives], settings.data, False, 0, settings.model, {**sets[0].truth, **sets[1].truth}
    )
    shares = [both.share(rank, 2) for rank in range(2)]
    assert shares == [[0, 1, 2], [3, 4, 5]] and both.share(0, 1) == list(range(6))


def test_the_status_follows_from_the_poses_where_nothing_was_recorded(sets):
    moments = list(sets[0].drives[0])
    truth = DrivingTruth.from_arrays(sets[0].truth[moments[1].token])
    status = ego_status(moments[1], truth.velocity)
    moved = torch.linalg.solve(moments[0].world_T_ego, moments[1].world_T_ego)[:2, 3]
    passed = moments[1].timestamp - moments[0].timestamp
    assert status[6:8].norm() == pytest.approx(float(moved.norm()) / passed, rel=1e-4)
    assert status[[0, 1, 2, 3, 4, 5, 8, 9]].isnan().all()


def test_anchors_are_of_the_training_split(settings, sets, tmp_path):
    settings.model.head.detection.anchors, settings.model.head.detection.kept = 12, 6
    settings.model.head.lines.anchors, settings.model.head.lines.kept = 6, 3
    anchors = find_anchors(sets[0])
    write_anchors(tmp_path / "anchors.json", anchors, settings.data.root, None)
    settings.anchors = str(tmp_path / "anchors.json")
    model = settings.build_model()
    torch.testing.assert_close(model.head.detection.bank.anchor.detach(), anchors.boxes)
    torch.testing.assert_close(model.head.motion.plan_anchor, read_anchors(settings.anchors).plan)
    boxes = [sets[0].targets(m, DrivingTruth.from_arrays(sets[0].truth[m.token]), torch.zeros(10)) for m in
             sets[0].drives[0]]  # fmt: skip
    places = torch.cat([truth.boxes[0] for truth in boxes])[:, :3]
    assert (anchors.boxes[:, None, :3] - places).norm(dim=-1).min(1).values.max() < 10
    (tmp_path / "anchors.json").write_text("{}")
    with pytest.raises(ValueError, match="anchors.json holds no anchors"):
        settings.build_model()
    settings.anchors = str(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="no such file; train/tools/make_anchors.py"):
        settings.build_model()
