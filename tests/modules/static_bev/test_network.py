"""The network: views of the ground, groups, LiDAR, head, losses, and that a stream is a window."""

import math
from dataclasses import replace

import pytest
import torch

from rigfuse.modules.backbones import PyramidConfig
from rigfuse.modules.lidar.second import LidarConfig
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig
from rigfuse.modules.static_bev.fusion import FusionConfig
from rigfuse.modules.static_bev.grid import BevGrid, GridConfig
from rigfuse.modules.static_bev.head import HeadConfig, HeadOutput, StaticSegHead, padded
from rigfuse.modules.static_bev.history import HistoryConfig
from rigfuse.modules.static_bev.losses import StaticTruth, static_losses
from rigfuse.modules.static_bev.network import Observation, StaticBevConfig, StaticInput
from rigfuse.modules.static_bev.view import GroundView, ViewConfig

RIG = nuscenes_like_rig()
SMALL = StaticBevConfig(
    grid=GridConfig((-3.2, 9.6), (-6.4, 6.4), (-3.0, 5.0), 1.6, 2),
    backbone=PyramidConfig("tiny", strides=(8, 16), frozen_stages=-1),
    image_channels=8, channels=8, view=ViewConfig(heads=2), fusion=FusionConfig("off"),
    head=HeadConfig(channels=8, layers=1), history=HistoryConfig(intervals=(0.5,), dtype="float32"),
)  # fmt: skip


def observation(batch=1, time=0.0, visible=None):
    rig = RIG.augmented(ImageAugmentation(0.04, (0, 4, 64, 32)))
    frames = [rig.frame(torch.eye(4), time, f"scene {i}") for i in range(batch)]
    return Observation(torch.randn(batch, 6, 3, 32, 64), frames[0].cat(frames), visible)


def test_a_cell_looks_where_it_is_seen():
    """Maps that say where in the image a cell lies: plain projection reads them exactly."""
    grid = BevGrid((4.0, 12.0), (-2.0, 2.0), 1.0)
    view = GroundView(grid, 2, 2, ViewConfig((0.0,), 1, learned=False))
    view.out.weight.data, view.out.bias.data = torch.eye(2), torch.zeros(2)
    view.smooth = torch.nn.Identity()
    camera = RIG["CAM_FRONT"]
    v, u = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    maps = torch.stack([u / 160, v / 90])[None, None].float()
    projection = camera.image_T_ego.float()[None, None]
    ground, seen = view([maps], projection, (900, 1600))
    points = torch.cat([grid.centres().flatten(0, 1), torch.zeros(32, 1), torch.ones(32, 1)], dim=1)
    pixels = points @ camera.image_T_ego.T
    expected = ((pixels[:, :2] / pixels[:, 2:3] + 0.5) / torch.tensor([1600.0, 900.0])).T.reshape(2, 4, 8)
    inside = ((expected > 0) & (expected < 1)).all(0)
    assert torch.equal(seen[0, 0] == 1, inside) and inside.sum() > 10 and not inside.all()
    near = (expected > 0.01).all(0) & (expected < 0.99).all(0)
    assert torch.allclose(ground[0].double()[:, near], expected[:, near], atol=1e-3)
    assert not ground[0][:, ~inside].any()
    none = view([maps], projection, (900, 1600), torch.zeros(1, 1, dtype=torch.bool))
    assert not none[0].any() and not none[1].any()


def test_places_form_a_lattice_and_each_head_begins_with_one_of_its_own():
    view = GroundView(BevGrid((0.0, 2.0), (0.0, 1.0), 1.0), 4, 4, ViewConfig((0.0,), places=4, heads=4))
    first = view.reference[0, :, :2]
    assert {tuple(x) for x in first.tolist()} == {(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)}
    weights = view.weight.bias.view(4, 4).softmax(dim=0)  # (points, heads)
    assert (weights.diagonal() > 0.6).all()
    two = GroundView(BevGrid((0.0, 2.0), (0.0, 1.0), 1.0), 4, 4, ViewConfig((0.0,), places=2, heads=4))
    assert two.reference[0, :, :2].tolist() == [[0.25, 0.25], [0.75, 0.75]]


def test_weights_sum_to_one_over_the_cameras_that_are_there():
    view = GroundView(SMALL.grid.features(), 4, 4, ViewConfig(heads=2))
    view.out.weight.data, view.out.bias.data = torch.eye(4), torch.zeros(4)
    view.smooth = torch.nn.Identity()
    for layer in (view.offset, view.weight):
        torch.nn.init.normal_(layer.weight, std=0.3)
    maps = torch.ones(1, 6, 4, 9, 16)
    visible = torch.tensor([[True, True, False, True, True, True]])
    for there in (None, visible):
        ground, seen = view([maps], RIG.image_T_ego.float()[None], (900, 1600), there)
        whole = seen[0, 0].bool() & (ground[0] > 0.5).all(0)
        assert ground.max() <= 1 + 1e-5 and whole.float().mean() > 0.5  # less only where an image ends
    assert (seen == 0).any()


def test_a_missing_camera_says_nothing_whatever_its_pixels_are():
    model, there = SMALL.build().eval(), torch.ones(1, 6, dtype=torch.bool)
    there[0, 3] = False
    one = observation(visible=there)
    other = replace(one, images=one.images.clone())
    other.images[:, 3] = torch.randn(3, 32, 64) * 100
    with torch.no_grad():
        assert torch.equal(model.see(one)[0], model.see(other)[0])
        assert not torch.equal(model.see(one)[0], model.see(replace(one, visible=None))[0])


def test_groups_have_backbones_of_their_own_in_any_order_of_cameras():
    model = SMALL.build().eval()
    assert sorted(model.cameras) == ["back", "back_sides", "front", "front_sides"]
    model.set_cameras(RIG.names)
    one = observation()
    order = [5, 3, 1, 0, 2, 4]
    frame = replace(one.frame, image_T_ego=one.frame.image_T_ego[:, order])
    with torch.no_grad():
        expected = model.see(one)[0]
        model.set_cameras([RIG.names[i] for i in order])
        assert torch.allclose(model.see(Observation(one.images[:, order], frame))[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="the rig has no CAM_BACK; no group has REAR"):
        model.set_cameras([*RIG.names[:5], "REAR"])


def test_a_stream_says_what_a_window_says():
    model = replace(SMALL, fusion=FusionConfig("concat")).build().eval()
    for layer in model.fusion.block:
        torch.nn.init.normal_(layer.weight, std=0.1)
    moments = [observation(2, time) for time in (0.0, 0.5)]
    frames = [moment.frame for moment in moments]
    with torch.no_grad():
        window = model(StaticInput(moments, [], frames))
        cached = model(StaticInput([], [model.see(moment) for moment in moments], frames))
        history = model.new_history()
        streamed = [model.stream(moment, history) for moment in moments][-1]
        alone = model(StaticInput(moments[1:], [], frames[1:]))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(StaticInput(moments, [], frames))
    assert 0 < (narrow.head.road - window.head.road).abs().max() < 0.3
    assert torch.equal(window.head.lanes, streamed.lanes) and torch.equal(window.head.lanes, cached.head.lanes)
    assert window.figures["history/found"] == 1 and alone.figures["history/found"] == 0
    assert not torch.equal(window.head.lanes, alone.head.lanes)


def test_lidar_alone_and_beside_cameras():
    small = dict(channels=(4, 4, 4), blocks=1, second=(4, 4), layers=0)
    lidar = LidarConfig(voxel_size=(0.4, 0.4, 8.0), frozen_stages=-1, **small)
    points = [torch.rand(40, 5) * 4, torch.empty(0, 5)]
    for cameras in (True, False):
        config = replace(SMALL, use_cameras=cameras, use_lidar=True, lidar=lidar)
        config.validate()
        model, moment = config.build().eval(), observation(2)
        features, seen = model.see(replace(moment, points=points))
        assert features.shape == (2, 8, 8, 8) and seen.all() and (features >= 0).all()
    with pytest.raises(ValueError, match=r"lidar: its map has \(32, 32\) cells, needs \(8, 8\)"):
        replace(config, lidar=replace(lidar, channels=(4,))).validate()


def truth_of(grid, boxes, classes=(9, 4, 3)):
    lanes, road, instances = classes
    return StaticTruth(
        torch.zeros(1, lanes, *grid.shape, dtype=torch.uint8), torch.zeros(1, *grid.shape, dtype=torch.uint8),
        torch.ones(1, lanes, dtype=torch.bool), torch.zeros(1, road, *grid.shape, dtype=torch.uint8),
        torch.ones(1, road, dtype=torch.bool), [boxes], torch.ones(1, instances, dtype=torch.bool),
    )  # fmt: skip


def perfect(grid, truth, turns):
    """The head's output that says the truth."""
    logit = lambda coverage: 16 * (coverage.float() / 255 - 0.5)  # noqa: E731
    heat, boxes = torch.full((1, 3, *grid.shape), -8.0), torch.zeros(1, 6, *grid.shape)
    for box in truth.instances[0]:
        cell = grid.cells(box[:2])
        u, v = cell.round().long().tolist()
        label = int(box[5])
        heat[0, label, v, u] = 8.0
        angle = box[4] * turns[label]
        boxes[0, :, v, u] = torch.cat([cell - cell.round(), box[2:4].log(), angle.sin()[None], angle.cos()[None]])
    return HeadOutput(logit(truth.lanes), logit(truth.road), heat, boxes)


def test_the_truth_has_no_loss_and_is_decoded_as_it_is():
    grid = BevGrid((0.0, 12.0), (-6.0, 6.0), 0.2)
    head = StaticSegHead(grid, 8, 2, HeadConfig(channels=4, layers=1))
    boxes = torch.tensor([[3.11, 1.33, 4.0, 0.8, 1.2, 0], [6.4, -2.2, 3.0, 1.1, -2.5, 1], [9.0, 3.0, 5, 2.5, 1.5, 2]])
    truth = truth_of(grid, boxes)
    truth.lanes[0, 2, 10:12], truth.road[0, 3, :30] = 255, 255
    output = perfect(grid, truth, head.turns)
    losses = static_losses(output, truth, grid, head.turns)
    assert all(0 <= value < 0.02 for value in losses.values()), losses
    (found,) = head.decode(output)
    order = found.boxes[:, 5].argsort()
    angles = found.boxes[order, 4] - boxes[:, 4]
    assert torch.allclose(found.boxes[order][:, [0, 1, 2, 3, 5]], boxes[:, [0, 1, 2, 3, 5]], atol=1e-4)
    assert angles[1].abs() < 1e-4 and ((angles + 1e-3) % math.pi < 2e-3).all()  # signs point somewhere
    rows, scores = padded([found], 100)
    assert rows.shape == (1, 100, 6) and scores[0, :3].min() > 0.99 and not scores[0, 3:].any()


def test_what_a_source_does_not_know_has_no_gradient():
    grid = BevGrid((0.0, 4.0), (-2.0, 2.0), 0.2)
    truth = truth_of(grid, torch.empty(0, 6))
    truth.lanes_known[0, 1:], truth.road_known[0, 0], truth.instances_known[0, 2] = False, False, False
    truth.unknown_lanes[0, 3:5], truth.lanes[0, 0, 9] = 255, 255
    maps = [torch.randn(1, n, *grid.shape, requires_grad=True) for n in (9, 4, 3, 6)]
    losses = static_losses(HeadOutput(*maps), truth, grid, torch.ones(3))
    sum(losses.values()).backward()
    lanes, road, heat, _ = (x.grad for x in maps)
    assert not lanes[0, 1:].any() and lanes[0, 0].all() and (lanes[0, 0, 3:5] < 0).all()  # some line is there
    assert (lanes[0, 0, 9] < 0).all() and (lanes[0, 0, 12:] > 0).all()
    assert not road[0, 0].any() and road[0, 1:].all() and not heat[0, 2].any() and heat[0, :2].all()


def test_a_class_that_is_not_there_does_not_count_in_dice():
    grid = BevGrid((0.0, 4.0), (-2.0, 2.0), 0.2)
    truth = truth_of(grid, torch.empty(0, 6))
    truth.lanes[0, 2, 5] = 255
    maps = [torch.randn(1, n, *grid.shape, requires_grad=True) for n in (9, 4, 3, 6)]
    static_losses(HeadOutput(*maps), truth, grid, torch.ones(3))["lane_dice"].backward()
    there = maps[0].grad[0].flatten(1).any(1)
    assert there.tolist() == [place == 2 for place in range(9)]


def test_dice_asks_for_sure_lines():
    """Where a line is in 6 of 10 samples, nobody can know in which: the least loss is at yes, not at 0.6."""
    grid = BevGrid((0.0, 4.0), (-2.0, 2.0), 0.2)
    truth = StaticTruth.cat([truth_of(grid, torch.empty(0, 6)) for _ in range(10)])
    truth.lanes[:6, 2, 5] = 255
    losses = []
    for chance in (0.02, 0.3, 0.6, 0.9, 0.98):
        maps = [torch.full((10, n, *grid.shape), -20.0) for n in (9, 4, 3, 6)]
        maps[0][:, 2, 5] = math.log(chance / (1 - chance))
        losses.append(static_losses(HeadOutput(*maps), truth, grid, torch.ones(3))["lane_dice"].item())
    assert losses == sorted(losses, reverse=True)
    cells = 10 * grid.columns
    assert losses[2] == pytest.approx(1 - (2 * 0.36 * cells + 1) / (1.2 * cells + 1), rel=1e-4)


def test_a_batch_with_little_that_is_true_does_not_shout():
    """The focal loss is divided by what is true, or by a thousandth of the cells where that is less."""
    grid = BevGrid((0.0, 20.0), (-10.0, 10.0), 0.2)
    maps = [torch.zeros(1, n, *grid.shape) for n in (9, 4, 3, 6)]
    each, cells = math.log(2) / 4, 100 * 100
    for covered, divisor in ((0, 90.0), (40, 90.0), (200, 200.0)):
        truth = truth_of(grid, torch.empty(0, 6))
        truth.lanes[0, 2].view(-1)[:covered] = 255
        loss = static_losses(HeadOutput(*maps), truth, grid, torch.ones(3))["lane_focal"]
        assert loss == pytest.approx(each * 9 * cells / divisor, rel=1e-4)


@pytest.mark.parametrize("scales", [1, 4])
def test_a_head_with_several_scales_sees_far(scales):
    grid = BevGrid((0.0, 21.0), (-6.5, 6.5), 1.0)  # of odd sizes
    head = StaticSegHead(grid, 3, 1, HeadConfig(channels=8, layers=1, scales=scales)).eval()
    features = torch.randn(1, 3, *grid.shape, requires_grad=True)
    output = head(features)
    assert output.lanes.shape == (1, 9, 13, 21)
    output.lanes[0, :, 6, 3].sum().backward()
    columns = features.grad[0].abs().amax((0, 1)).nonzero()[:, 0]
    assert columns.max() == (3 + 3 if scales == 1 else 20)  # three convolutions, or nearly everything
