"""Losses of the driving head: what they must not depend on, and that a head learns by them."""

import math

import pytest
import torch

from rigfuse.modules.polylines import line_orders
from rigfuse.modules.rig import RigFrame, nuscenes_like_rig
from rigfuse.modules.sparse_drive import boxes
from rigfuse.modules.sparse_drive.head import SparseDriveHead
from rigfuse.modules.sparse_drive.losses import LOSS_WEIGHTS, DriveTruth, LossConfig, drive_losses
from rigfuse.modules.sparse_drive.network import tiny
from rigfuse.modules.sparse_drive.results import ResultConfig, read_results

SIZE = (64, 128)
CAR, BARRIER, CONE = 0, 5, 9


def small_config():
    config = tiny().head
    config.channels, config.heads, config.levels = 32, 2, 2
    config.detection.anchors, config.detection.kept, config.detection.layers = 30, 10, 2
    config.lines.anchors, config.lines.kept, config.lines.layers, config.lines.points = 8, 3, 2, 4
    for decoder in (config.detection, config.lines):
        decoder.deformable.groups, decoder.dropout, decoder.deformable.keypoint_dropout = 4, 0.0, 0.0
    config.motion.agents, config.motion.lines, config.motion.dropout = 6, 3, 0.0
    return config


def moment(batch):
    rig = nuscenes_like_rig()
    scale = torch.diag(torch.tensor([SIZE[1] / 1600, SIZE[0] / 900, 1, 1], dtype=torch.float64))
    pose = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    projection = (scale @ rig.image_T_ego).expand(batch, -1, -1, -1)
    return RigFrame(projection, pose, torch.zeros(batch, dtype=torch.float64), tuple("ab"[:batch]))


def truth(boxes_of=((CAR, 8.0, 3.0, 0.3), (CONE, 12.0, -4.0, 0.0)), batch=1):
    """The same scene for each sample: boxes (label, x, y, yaw), one line, one way."""
    found = torch.tensor([[x, y, 0.8, 4.0, 1.8, 1.6, yaw, 2.0, 0.0] for _, x, y, yaw in boxes_of]).view(-1, 9)
    labels = torch.tensor([label for label, *_ in boxes_of], dtype=torch.int64)
    line = torch.stack([torch.linspace(-8, 12, 4), torch.full((4,), 5.0)], 1)
    steps = torch.tensor([1.0, 0.2]).expand(len(found), 12, 2)
    plan = torch.tensor([2.0, 0.1]).expand(batch, 6, 2)
    return DriveTruth(
        [found] * batch, [labels] * batch, [line_orders(line)[None]] * batch, [torch.tensor([1])] * batch,
        [steps] * batch, [torch.ones(len(found), 12, dtype=torch.bool)] * batch, plan,
        torch.ones(batch, 6, dtype=torch.bool), torch.full((batch,), 2), torch.ones(batch, 10),
    )  # fmt: skip


def maps(batch=1):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, 6, 32, SIZE[0] // stride, SIZE[1] // stride) for stride in (8, 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def head():
    return SparseDriveHead(small_config()).eval()


def losses_of(head, facts, batch=1, **settings):
    output, _ = head(maps(batch), moment(batch), SIZE)
    return drive_losses(output, facts, head.config, LossConfig(box_threshold=0.0, **settings)), output


def changed(facts, **fields):
    return DriveTruth(**{**vars(facts), **fields})


def test_unknown_numbers_contribute_nothing(head):
    facts = truth()
    known, output = losses_of(head, facts)
    unknown = facts.boxes[0].clone()
    unknown[:, 7:] = float("nan")
    half, _ = losses_of(head, changed(facts, boxes=[unknown]))
    # By hand: what the velocities of the matched boxes cost.
    expected = 0
    for layer, matches in enumerate(known.boxes):
        for instance, target in zip(matches[0].instance, matches[0].truth):
            error = output.detection.anchors[layer, 0, instance, 8:10] - facts.boxes[0][target, 7:]
            expected = expected + error.abs().sum() / 2
    difference = known.total["det_box"] - half.total["det_box"]
    torch.testing.assert_close(difference, expected)
    dark = facts.future_known[0] & False
    nothing = changed(facts, future_known=[dark], futures=[facts.futures[0] * float("nan")])
    blind, _ = losses_of(head, nothing)
    assert blind.total["motion_cls"] == blind.total["motion_reg"] == 0
    gradients = torch.autograd.grad(sum(half.total.values()) + sum(blind.total.values()), list(head.parameters()),
                                    allow_unused=True)  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_truth_without_place_or_size_has_no_match(head):
    facts = truth()
    broken = torch.cat([facts.boxes[0], facts.boxes[0]])
    broken[2, 0], broken[3, 4] = float("nan"), 0
    twice = [torch.cat([t, t]) for t in (facts.labels[0], facts.futures[0], facts.future_known[0])]
    more = changed(facts, boxes=[broken], labels=[twice[0]], futures=[twice[1]], future_known=[twice[2]])
    plain, _ = losses_of(head, facts)
    careful, _ = losses_of(head, more)
    for name, value in plain.total.items():
        torch.testing.assert_close(careful.total[name], value)


def test_a_barrier_may_be_turned_round_and_a_cone_has_no_yaw(head):
    for label, equal in ((BARRIER, True), (CAR, False), (CONE, True)):
        found = []
        for yaw in (0.4, 0.4 + math.pi if label != CONE else 1.9):
            losses, _ = losses_of(head, truth([(label, 8.0, 3.0, yaw)]))
            found.append(losses.total["det_box"])
        assert torch.allclose(*found, rtol=1e-4) == equal, label


def test_nothing_to_find(head):
    """No box and no line: everything is background, all losses are finite and have gradients."""
    facts = truth(boxes_of=())
    empty = changed(facts, lines=[torch.zeros(0, 6, 4, 2)], line_labels=[torch.zeros(0, dtype=torch.int64)])
    losses, _ = losses_of(head, empty)
    assert losses.total.keys() == LOSS_WEIGHTS.keys() - {"depth"}
    assert losses.total["det_cls"] > 0 and losses.total["det_box"] == 0 == losses.total["map_line"]
    sum(losses.total.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_samples_do_not_mix(head):
    """Losses of two samples are those of one, weighted by how much truth each has."""
    one, _ = losses_of(head, truth())
    output, _ = head([level.expand(2, -1, -1, -1, -1) for level in maps()], moment(2), SIZE)
    two = drive_losses(output, truth(batch=2), head.config, LossConfig(box_threshold=0.0))
    for name, value in one.total.items():
        torch.testing.assert_close(two.total[name], value, rtol=1e-4, atol=1e-5)


def test_a_head_learns_a_scene():
    """Two samples with other images and other scenes, learned by heart: boxes, lines and the plan are found."""
    torch.manual_seed(1)
    config = small_config()
    head = SparseDriveHead(config).train()
    with torch.no_grad():
        head.detection.bank.anchor[:, :2] *= 0.35  # where the scenes are, as anchors of data would be
    levels = [level.requires_grad_() for level in maps(2)]
    scenes = [truth([(CAR, 8.0, 3.0, 0.3), (CONE, 12.0, -4.0, 0.0)]), truth([(CAR, -9.0, -3.0, 2.0)])]
    facts = DriveTruth(**{
        name: torch.cat([getattr(s, name) for s in scenes])
        if isinstance(getattr(scenes[0], name), torch.Tensor) else sum((getattr(s, name) for s in scenes), [])
        for name in vars(scenes[0])
    })  # fmt: skip
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0)
    for step in range(90):
        output, _ = head(levels, moment(2), SIZE)
        losses = drive_losses(output, facts, config).total
        weights = LOSS_WEIGHTS | dict(det_box=0.5)
        total = sum(weights[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 25.0)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 90))
    results = read_results(output, facts.command, config, ResultConfig(boxes=5, rescore=False))
    for sample, result in enumerate(results):
        for box, label in zip(facts.boxes[sample], facts.labels[sample]):
            # The scenes' cars are 18 m apart.
            apart = (result.boxes[:, :2] - box[:2]).norm(dim=1)
            found = (result.labels == label) & (result.class_scores > 0.2) & (apart < 2.0)
            assert found.any(), (sample, int(label), apart, result.labels, result.class_scores)
        best_line = result.lines[0]
        target = facts.lines[sample][0, :2]
        assert (best_line - target).norm(dim=-1).mean(-1).min() < 2.0
        assert (result.plan[-1] - facts.ego_future[sample].sum(0)).norm() < 1.0
    assert boxes.decode(output.detection.anchors[-1]).isfinite().all()
