"""The driving head as it is by default: streams, absent cameras, precision, refusals."""

import math
from dataclasses import fields, is_dataclass

import pytest
import torch

from rigfuse.modules.rig import RigFrame, nuscenes_like_rig
from rigfuse.modules.sparse_drive.anchors import spread_anchors
from rigfuse.modules.sparse_drive.head import SparseDriveHead, as_upstream
from rigfuse.modules.sparse_drive.network import tiny

SIZE = (64, 128)  # of the images
FRONT, BACK = 0, 5


def small_config():
    config = tiny().head
    config.channels, config.heads, config.levels = 32, 2, 2
    config.detection.anchors, config.detection.kept, config.detection.layers = 24, 10, 2
    config.lines.anchors, config.lines.kept, config.lines.layers, config.lines.points = 8, 3, 2, 4
    for decoder in (config.detection, config.lines):
        decoder.deformable.groups = 4
    config.motion.agents, config.motion.lines = 6, 3
    return config


@pytest.fixture
def head():
    """With weights that are not zero where training begins with zeros: or all would look at the same places."""
    head = SparseDriveHead(small_config())
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "deformable.weights" in name:
                parameter.normal_(std=0.2)
    return head.eval()


def frame(times, scenes=None, poses=None):
    """A rig of six cameras for small images, at `times` seconds, one sample each."""
    rig = nuscenes_like_rig()
    scale = torch.diag(torch.tensor([SIZE[1] / 1600, SIZE[0] / 900, 1, 1], dtype=torch.float64))
    scenes = scenes or ["a"] * len(times)
    world_T_ego = torch.eye(4, dtype=torch.float64).repeat(len(times), 1, 1)
    world_T_ego[:, 0, 3] = torch.tensor(poses if poses is not None else [5.0 * t for t in times])
    projection = (scale @ rig.image_T_ego).expand(len(times), -1, -1, -1)
    return RigFrame(projection, world_T_ego, torch.tensor(times, dtype=torch.float64), tuple(scenes))


def maps(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 6, 32, SIZE[0] // stride, SIZE[1] // stride) for stride in (8, 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tensors(tree):
    """All tensors of dataclasses, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if not is_dataclass(tree) or isinstance(tree, RigFrame):
        return []
    return [tensor for field in fields(tree) for tensor in tensors(getattr(tree, field.name))]


def batch_dim(tensor, batch):
    return 0 if tensor.shape[0] == batch else 1  # what layers say is stacked in front


def assert_same(tree, other):
    for a, b in zip(tensors(tree), tensors(other), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def sample_of(tree, sample, batch):
    return [t.narrow(batch_dim(t, batch), sample, 1) for t in tensors(tree)]


@torch.no_grad()
def test_samples_stream_on_their_own(head):
    """Three drives in one batch give what each gives alone: one goes on, one changes its scene, one stands too long."""
    times = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 5.0], [1.4, 1.5, 5.5]]
    scenes = [["a", "b", "c"]] * 2 + [["a", "d", "c"]] * 2
    together, alone = None, [None] * 3
    for moment, (time, scene) in enumerate(zip(times, scenes)):
        levels = maps(3, seed=moment)
        output, together = head(levels, frame(time, scene), SIZE, together)
        for sample in range(3):
            own = [level[sample : sample + 1] for level in levels]
            moment_alone = frame(time[sample : sample + 1], scene[sample : sample + 1])
            expected, alone[sample] = head(own, moment_alone, SIZE, alone[sample])
            for a, b in zip(sample_of(output, sample, 3), tensors(expected), strict=True):
                torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "time, scene", [(0.5, "b"), (2.6, "a"), (0.0, "a"), (-0.5, "a")], ids=["scene", "gap", "same time", "backwards"]
)
def test_a_drive_without_a_past_begins_anew(head, time, scene):
    """What the state holds of another drive changes nothing but the ids, which nobody has had."""
    _, state = head(maps(seed=1), frame([0.0]), SIZE)
    later = frame([time], [scene], [0.0])
    output, after = head(maps(seed=2), later, SIZE, state)
    fresh, fresh_after = head(maps(seed=2), later, SIZE)
    ids = output.detection.ids
    assert ids.min() >= fresh.detection.ids.max() and ids.unique().numel() == ids.numel()
    torch.testing.assert_close(output.detection.anchors, fresh.detection.anchors)
    torch.testing.assert_close(output.lines.logits, fresh.lines.logits)
    torch.testing.assert_close(output.motion.steps, fresh.motion.steps)
    assert (output.motion.period == 1).all()
    torch.testing.assert_close(after.detection.confidence, fresh_after.detection.confidence)


@torch.no_grad()
def test_instances_live_on(head):
    """Ids are inherited, confidence decays no faster than it may, agents remember, time moves the kept boxes."""
    _, state = head(maps(seed=1), frame([0.0]), SIZE)
    output, after = head(maps(seed=2), frame([0.5]), SIZE, state)
    kept = state.detection.ids.shape[1]
    assert torch.equal(output.detection.ids[:, :kept], state.detection.ids)
    assert (output.detection.ids[:, kept:] >= state.detection.next_id[:, None]).all()
    assert after.detection.confidence.max() >= 0.6 * state.detection.confidence.max() - 1e-6
    known = state.motion.confidence > head.config.motion.track_threshold
    remembered = output.motion.period[:, :-1] == 2
    same = (output.detection.ids[:, :, None] == state.motion.ids[:, None]) & known[:, None]
    assert torch.equal(remembered, same.any(-1)) and (output.motion.period[:, -1] == 2).all()
    # The ego vehicle drove 2.5 m ahead: its own past lies behind it.
    torch.testing.assert_close(output.motion.past[0, -1, -2, 0], output.motion.past[0, -1, -1, 0] - 2.5)
    assert not any(tensor.requires_grad for tensor in tensors(after))


def test_a_camera_that_is_not_visible_is_not_read(head):
    visible = torch.ones(1, 6, dtype=torch.bool)
    visible[:, [FRONT, BACK]] = False
    dirty = maps()
    for level in dirty:
        level[:, [FRONT, BACK]] = float("nan")
    clean = [torch.where(level.isnan(), 7.0, level).requires_grad_() for level in dirty]
    head.train()
    for module in head.modules():
        module.training = isinstance(module, (torch.nn.BatchNorm2d, SparseDriveHead))
    output, _ = head(clean, frame([0.0]), SIZE, visible=visible)
    gradients = torch.autograd.grad(output.motion.plan_steps.square().sum() + output.detection.anchors.sum(), clean)
    expected, _ = head(dirty, frame([0.0]), SIZE, visible=visible)
    assert_same(output, expected)
    assert all(tensor.isfinite().all() for tensor in tensors(output))
    assert gradients[1].isfinite().all() and gradients[1][:, 1].any()
    assert not any(gradient[:, [FRONT, BACK]].any() for gradient in gradients)


@torch.no_grad()
def test_the_plan_survives_the_loss_of_the_front_camera(head):
    """By default the ego vehicle looks through all cameras; upstream's through the front one alone."""
    visible = torch.ones(1, 6, dtype=torch.bool)
    visible[:, FRONT] = False
    config = small_config()
    config.motion.ego_view = "CAM_FRONT"
    upstream = SparseDriveHead(config).eval()
    upstream.load_state_dict(head.state_dict())
    levels = maps()
    levels[-1].requires_grad_()
    for network, blind in ((head, False), (upstream, True)):
        remembered = []
        hook = network.motion.ego_encoder.register_forward_hook(lambda _, __, found: remembered.append(found))
        output, _ = network(levels, frame([0.0]), SIZE, visible=visible)
        hook.remove()
        assert output.motion.plan_steps.isfinite().all()
        assert (not remembered[0].any()) == blind


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_over_the_cameras_that_are_there(head, renormalise):
    from rigfuse.modules.sparse_drive.deformable import Views

    block = head.detection.layers[0].deformable
    block.config.renormalise = renormalise
    visible = torch.tensor([[True, False, True, True, False, True]])
    views = Views(maps(), frame([0.0]).image_T_ego.float(), SIZE, visible)
    weights = block._weights(torch.randn(1, 24, 32), views)  # (B, N, P, V, levels, groups)
    share = weights.sum((2, 3, 4))
    there = weights[:, :, :, visible[0]].sum((2, 3, 4))
    torch.testing.assert_close(share, torch.ones_like(share))
    assert ((there - 1).abs().max() < 1e-5) == renormalise


def test_bfloat16(head):
    """Under autocast geometry stays in metres' precision: results are those of float32 within bfloat16's error."""
    expected, _ = head(maps(), frame([0.0]), SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = head([level.bfloat16() for level in maps()], frame([0.0]), SIZE)
        later, _ = head([level.bfloat16() for level in maps()], frame([0.5]), SIZE, state)
    assert output.detection.anchors.dtype == output.motion.steps.dtype == torch.float32
    torch.testing.assert_close(output.detection.anchors, expected.detection.anchors, atol=0.3, rtol=0.05)
    torch.testing.assert_close(output.lines.anchors, expected.lines.anchors, atol=0.3, rtol=0.05)
    assert later.detection.anchors.isfinite().all()


@torch.no_grad()
def test_measured_speed(head):
    head.motion.config.ego_speed = "measured"
    status = torch.zeros(1, 10)
    status[:, 6] = 8.0
    output, _ = head(maps(), frame([0.0]), SIZE, ego_status=status)
    assert output.motion.past[0, -1, -1, 8:].tolist() == [8.0, 0.0, 0.0]  # ahead is along x
    with pytest.raises(ValueError, match="ego_speed is 'measured', needs ego_status"):
        head(maps(), frame([0.0]), SIZE)


def test_upstreams_options(head):
    config = as_upstream(small_config())
    assert config.detection.stale_history == config.lines.stale_history == "attended"
    assert config.motion.ego_view == "CAM_FRONT" and config.line_range == (30.0, 60.0)
    assert math.isclose(config.ego.box[6], math.pi / 2)
    network = SparseDriveHead(config)
    torch.testing.assert_close(
        network.motion.ego_anchor[0, :8],
        torch.tensor([0, 0.5, -1.06, math.log(4.08), math.log(1.73), math.log(1.56), 1, 0]),
    )
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in head.state_dict().items()
    }


@torch.no_grad()
def test_the_order_of_the_cameras_does_not_matter(head):
    """So weights of a head that was trained with the cameras in another order, as upstream's, need none of theirs."""
    order = [0, 2, 1, 5, 3, 4]
    config = as_upstream(small_config())
    config.cameras = tuple(config.cameras[place] for place in order)
    heads = [SparseDriveHead(as_upstream(small_config())).eval(), SparseDriveHead(config).eval()]
    for each in heads:
        each.load_state_dict(head.state_dict())
    now = frame([0.0])
    other = RigFrame(now.image_T_ego[:, order], now.world_T_ego, now.timestamp, now.scene)
    expected, _ = heads[0](maps(), now, SIZE)
    output, _ = heads[1]([level[:, order] for level in maps()], other, SIZE)
    torch.testing.assert_close(output.detection.anchors, expected.detection.anchors, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.motion.plan_steps, expected.motion.plan_steps, atol=1e-4, rtol=1e-4)


def test_refusals(head):
    with pytest.raises(ValueError, match="maps are of 5 cameras, needs 6: CAM_FRONT, "):
        head([level[:, :5] for level in maps()], frame([0.0]), SIZE)
    with pytest.raises(ValueError, match=r"8 × 16 cells for an image of \(60, 128\), needs divisors; pad the images"):
        head(maps(), frame([0.0]), (60, 128))
    _, state = head(maps(2), frame([0.0, 0.0]), SIZE)
    with pytest.raises(ValueError, match="state is of 2 samples, frame of 1"):
        head(maps(), frame([0.5]), SIZE, state)
    config = small_config()
    config.detection.kept = 24
    with pytest.raises(ValueError, match="kept is 24, needs 1 to 23 of 24 anchors"):
        config.build()
    config = small_config()
    config.motion.ego_view = "CAM_FORNT"
    with pytest.raises(ValueError, match="no camera 'CAM_FORNT'; choose one of"):
        config.build()
    anchors = spread_anchors(small_config())
    wrong = type(anchors)(anchors.boxes[:5], anchors.lines, anchors.motion, anchors.plan)
    with pytest.raises(ValueError, match=r"anchors of shape \(5, 11\), needs \(24, 11\)"):
        head.set_anchors(wrong)


@torch.no_grad()
def test_the_state_can_be_stored(head, tmp_path):
    _, state = head(maps(seed=1), frame([0.0]), SIZE)
    torch.save(state, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=False)
    results = [head(maps(seed=2), frame([0.5]), SIZE, past)[0] for past in (state, stored)]
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors, results)))


@torch.no_grad()
def test_the_network_pads_and_streams():
    config = tiny()
    config.backbone.strides = (8, 16, 32)
    network = config.build().eval()
    images = torch.randn(1, 6, 3, 60, 100)
    levels, size = network.extract(images)
    assert size == (64, 128) and [tuple(level.shape[2:]) for level in levels] == [(64, 8, 16), (64, 4, 8), (64, 2, 4)]
    output, state, seen = network(images, frame([0.0]), complete=lambda levels: [2 * level for level in levels])
    torch.testing.assert_close(seen[0], 2 * levels[0])
    output, _, _ = network(images, frame([0.5]), state)
    assert output.detection.anchors.shape == (2, 1, 120, 11) and output.motion.plan_steps.shape == (1, 3, 6, 6, 2)
    depths = network.depth(levels, torch.full((1, 6), 100.0))
    assert [tuple(depth.shape) for depth in depths] == [(1, 6, 8, 16), (1, 6, 4, 8)]
    truth = [depth + torch.tensor([3.0]) for depth in depths]
    truth[0][:, :3] = 0  # unknown
    truth[1][:, 3] = float("nan")
    torch.testing.assert_close(network.depth.loss(depths, truth), torch.tensor(3.0))
