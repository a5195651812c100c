"""Boxes and lines through time, keypoints in images, anchors, plans that meet agents."""

import math
from types import SimpleNamespace

import pytest
import torch

from rigfuse.modules import polylines
from rigfuse.modules.projection import project
from rigfuse.modules.rig import nuscenes_like_rig
from rigfuse.modules.sparse_drive import anchors, boxes, lines
from rigfuse.modules.sparse_drive.deformable import Views
from rigfuse.modules.sparse_drive.motion import EgoConfig, EgoEncoder, turned
from rigfuse.modules.sparse_drive.results import ResultConfig, plans_meet_agents


def pose(x, y, yaw):
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    matrix[0, 3], matrix[1, 3] = x, y
    return matrix


def test_a_box_that_drives_on_is_where_it_will_be():
    """Seen from an ego vehicle that drives and turns: position, heading and velocity of the world stay consistent."""
    world_box = torch.tensor([10.0, 5.0, 1.0, 4.5, 2.0, 1.6, 0.7, 3.0, -2.0, 0.0], dtype=torch.float64)
    later_box = world_box.clone()
    later_box[:2] += 0.5 * world_box[7:9]
    then, now = pose(1, 2, 0.3), pose(4, 1, -0.4)

    def seen_from(world_T_ego, box):
        back = torch.linalg.inv(world_T_ego)
        place = back @ torch.tensor([*box[:3].tolist(), 1.0], dtype=torch.float64)
        yaw = math.atan2(world_T_ego[1, 0], world_T_ego[0, 0])
        velocity = back[:3, :3] @ box[7:]
        return torch.cat([place[:3], box[3:6], box[6:7] - yaw, velocity])

    code = boxes.encode(seen_from(then, world_box))[None, None]
    now_T_then = torch.linalg.solve(now, then)[None]
    moved = boxes.move(code, now_T_then, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(boxes.decode(moved)[0, 0], seen_from(now, later_box))
    torch.testing.assert_close(boxes.move(code, torch.eye(4, dtype=torch.float64)[None]), code)


def test_a_line_stands_still():
    line = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    moved = lines.move(line.view(1, 1, 4), torch.linalg.inv(pose(1, 2, math.pi / 2))[None])
    torch.testing.assert_close(moved.view(2, 2), torch.tensor([[0.0, 0.0], [2.0, -2.0]], dtype=torch.float64))


def test_orders_of_a_line():
    open_line = torch.tensor([[0.0, 0], [1, 0], [2, 1]])
    orders = polylines.line_orders(open_line)
    assert orders.shape == (4, 3, 2) and torch.equal(orders[:2], torch.stack([open_line, open_line.flip(0)]))
    assert (orders[2:] == polylines.FAR).all()
    ring = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    orders = polylines.line_orders(ring)
    assert orders.shape == (8, 5, 2) and len(orders.unique(dim=0)) == 8
    assert torch.equal(orders[:, 0], orders[:, -1])
    steps = (orders[:, 1:] - orders[:, :-1]).norm(dim=-1)
    torch.testing.assert_close(steps, torch.ones(8, 4))  # each walks along the sides
    assert any(torch.equal(order, ring.flip(0)) for order in orders) and torch.equal(orders[0], ring)


def test_keypoints_lie_on_the_box():
    keypoints = boxes.BoxKeypoints(16, learned=5)
    box = boxes.encode(torch.tensor([[[10.0, 5, 1, 4, 2, 1.5, 0.7, 0, 0, 0]]]))
    places = keypoints(box, torch.randn(1, 1, 16) * 100)
    own = (places[0, 0] - box[0, 0, :3]) @ torch.tensor(
        [[math.cos(0.7), -math.sin(0.7), 0], [math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]]
    )
    assert places.shape == (1, 1, 12, 3) and keypoints.count == 12
    assert (own.abs() <= torch.tensor([2.0, 1.0, 0.75]) + 1e-5).all()
    torch.testing.assert_close(own[1], torch.tensor([1.8, 0, 0]), atol=1e-5, rtol=0)


def test_points_are_seen_where_the_rig_says():
    """(u + ½) / width: the centre of the first pixel is half a pixel from the corner. Behind a camera is nowhere."""
    rig = nuscenes_like_rig()
    maps = [torch.zeros(1, 6, 1, 9, 16)]
    views = Views(maps, rig.image_T_ego.float()[None], (900, 1600))
    point = torch.tensor([20.0, 3.0, 1.0])
    u, v, depth, _ = (rig["CAM_FRONT"].image_T_ego @ torch.tensor([20.0, 3, 1, 1], dtype=torch.float64)).tolist()
    expected = torch.tensor([(u / depth + 0.5) / 1600, (v / depth + 0.5) / 900])
    seen = project(point.view(1, 1, 1, 3), views.projection, views.image_size)[0, 0, 0]
    torch.testing.assert_close(seen[0], expected)
    assert (seen[rig.index("CAM_BACK")] == -1).all()
    corners = project(point.view(1, 1, 1, 3), views.projection, views.image_size, half_pixel=False)[0, 0, 0]
    torch.testing.assert_close(seen[0] - corners[0], torch.tensor([0.5 / 1600, 0.5 / 900]), atol=1e-6, rtol=0)


def test_kmeans_finds_heaps_and_repeats():
    heaps = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    samples = (heaps[:, None] + 0.1 * torch.randn(3, 40, 2)).flatten(0, 1)
    centres = anchors.kmeans(samples, 3)
    assert torch.cdist(heaps, centres).min(1).values.max() < 0.1
    assert torch.equal(centres, anchors.kmeans(samples, 3))
    with pytest.raises(ValueError, match="samples has 2 different rows, needs at least 3"):
        anchors.kmeans(samples[:2].repeat(5, 1), 3)


def test_anchors_from_data():
    seen = torch.rand(200, 9) * 40 + 1
    seen[:5] = float("nan")
    seen[5:10, 0] = 500
    found = anchors.box_anchors(seen, 20)
    assert found.shape == (20, 11) and (found[:, 7] == 1).all() and found[:, :2].norm(dim=1).max() <= 58
    torch.testing.assert_close(found[0, 3:6].exp(), seen[10:, 3:6][seen[10:, :2].norm(dim=1) <= 55].mean(0))
    assert anchors.line_anchors(torch.randn(60, 5, 2), 7).shape == (7, 10)

    # Cars drive ahead at three speeds, whatever their heading; people have no futures of their own.
    yaw = torch.rand(90) * 6
    speed = torch.tensor([1.0, 4.0, 9.0]).repeat(30)
    ahead = torch.stack([yaw.cos(), yaw.sin()], 1)
    steps = (speed[:, None] * ahead)[:, None].expand(-1, 4, -1).clone()
    known = torch.ones(90, 4, dtype=torch.bool)
    known[:10, 2:] = False
    steps[:10, 2:] = float("nan")
    ways = anchors.motion_anchors(steps, known, yaw, torch.zeros(90, dtype=torch.int64), classes=2, modes=3)
    assert ways.shape == (2, 3, 4, 2) and torch.equal(ways[0], ways[1])
    torch.testing.assert_close(ways[0, :, -1, 0].sort().values, torch.tensor([4.0, 16, 36]), atol=1e-3, rtol=0)
    torch.testing.assert_close(ways[..., 1], torch.zeros(2, 3, 4), atol=1e-3, rtol=0)
    # … and turned by a heading they are where that agent goes.
    box = boxes.encode(torch.tensor([[[0, 0, 0, 4, 2, 1.5, yaw[20], 0, 0, 0]]]))
    end = turned(ways[0, :, -1][None, None], box)[0, 0]
    assert torch.cdist(end, steps[20].sum(0)[None]).min() < 1e-3
    plans = anchors.plan_anchors(steps, known, torch.arange(90) % 3, modes=1)
    assert plans.shape == (3, 1, 4, 2)


def meeting(agent, plan, ego=None, steps=None, **settings):
    """Whether a plan (T, 2) meets one sure agent: (x, y, length, width, yaw) that makes `steps` (T, 2)."""
    x, y, length, width, yaw = agent
    code = boxes.encode(torch.tensor([[[x, y, 0, length, width, 1.5, yaw, 0, 0, 0]]], dtype=torch.float32))
    plan = torch.as_tensor(plan, dtype=torch.float32)
    steps = torch.zeros(len(plan), 2) if steps is None else torch.as_tensor(steps, dtype=torch.float32)
    logit = settings.pop("logit", 5.0)
    detection = SimpleNamespace(anchors=code[None], logits=torch.full((1, 1, 1, 2), logit))
    # Of two modes the second is the likelier.
    motion = SimpleNamespace(
        logits=torch.tensor([[[0.0, 1.0]]]), steps=torch.stack([torch.full_like(steps, 99.0), steps])[None, None]
    )
    output = SimpleNamespace(detection=detection, motion=motion)
    return bool(plans_meet_agents(output, plan[None, None], ego or EgoConfig(), ResultConfig(**settings)))


def test_plans_that_meet_agents():
    """By hand: the vehicle is 4.08 × 1.73 m, taken 1.1 times as large, its centre 1.44 m ahead of what plans move."""
    straight = [[2.0 * step, 0.0] for step in range(1, 7)]  # to x = 12, its front then at 15.68
    assert meeting((16.0, 0.0, 4.0, 2.0, 0.0), straight)
    assert not meeting((18.0, 0.0, 4.0, 2.0, 0.0), straight)
    assert not meeting((16.0, 0.0, 4.0, 2.0, 0.0), straight, rescore_shift=-2.0)
    assert not meeting((16.0, 0.0, 4.0, 2.0, 0.0), straight, logit=-1.0)  # nobody sure
    assert not meeting((8.0, 2.2, 4.0, 2.0, 0.0), straight)  # beside
    assert meeting((8.0, 2.2, 4.0, 2.0, math.pi / 2), straight)  # across
    assert not meeting((8.0, -12.0, 4.0, 2.0, 0.0), straight)
    crossing = [[0.0, 3.0]] * 6  # it is at y = 0 after four steps, when the vehicle is at x = 8
    assert meeting((8.5, -12.0, 4.0, 2.0, math.pi / 2), straight, steps=crossing)
    # They cross like the bars of a plus: no corner of one lies in the other.
    crossed = (8.5, -12.0, 4.0, 2.0, math.pi / 2)
    assert not meeting(crossed, straight, steps=crossing, rescore_overlap="corners")
    assert not meeting((8.5, -30.0, 4.0, 2.0, math.pi / 2), straight, steps=crossing)
    lidar = EgoConfig(box=(0.0, 0.5, -1.06, 4.08, 1.73, 1.56, math.pi / 2), ground=-1.84)
    ahead = [[0.0, 2.0 * step] for step in range(1, 7)]
    assert meeting((0.0, 16.0, 4.0, 2.0, math.pi / 2), ahead, ego=lidar)
    assert not meeting((0.0, 17.0, 4.0, 2.0, math.pi / 2), ahead, ego=lidar)


def test_the_ego_vehicle_sees_the_mean_of_the_cameras_that_are_there():
    encoder, maps = EgoEncoder(8).eval(), torch.randn(2, 3, 8, 4, 6)
    found = encoder(maps, torch.tensor([[True, False, True], [False] * 3]))
    torch.testing.assert_close(found[0], encoder(maps[:1, [0, 2]], None)[0])
    assert not found[1].any()
