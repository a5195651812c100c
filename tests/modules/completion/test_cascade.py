import itertools
from dataclasses import replace

import pytest
import torch

from rigfuse.modules import attention
from rigfuse.modules.backbones import PyramidConfig, ResNetFPN
from rigfuse.modules.camera_dropout import DropoutConfig, RandCamMask
from rigfuse.modules.completion import planning_guided
from rigfuse.modules.completion import temporal as temporal_stage
from rigfuse.modules.completion.cascade import CompletionCascade, consistency_losses
from rigfuse.modules.completion.planning_guided import PlanningConfig, PlanningGuidedCompletion, project_trajectory
from rigfuse.modules.completion.temporal import MotionCompensatedTemporalCompletionV2, TemporalConfig
from rigfuse.modules.completion.vae import PVReconVAE, VAEConfig
from rigfuse.modules.rig import ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.window import RigWindow
from rigfuse.train.data import open_drives
from support.networks import with_noise

STRIDES, CHANNELS = (16, 32), 32
SMALL = dict(heads=2, kv_downsample=2)
WIDTH, HEIGHT = 200, 112
FRONT, BACK = 0, 5


def frame_of(drive, index):
    """A moment of the built-in drive with images shrunk to an eighth."""
    frame = drive[index].frame
    rig = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.125))
    return RigFrame(rig.image_T_ego[None], frame.world_T_ego, frame.timestamp, frame.scene)


@pytest.fixture(scope="module")
def window() -> RigWindow:
    drive = open_drives(None)[0]
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(1, 3, 6, 3, HEIGHT, WIDTH, generator=generator)
    trajectory = torch.stack([torch.arange(1, 7) * 4.0, torch.zeros(6)], dim=-1)[None]
    return RigWindow(images, [frame_of(drive, index) for index in range(3)], trajectory)


def temporal(stride) -> MotionCompensatedTemporalCompletionV2:
    return MotionCompensatedTemporalCompletionV2(CHANNELS, TemporalConfig(**SMALL, stride=stride))


def planning(strides) -> PlanningGuidedCompletion:
    return PlanningGuidedCompletion(strides, CHANNELS, PlanningConfig(**SMALL, sigma=16.0))


def cascade(**stages) -> CompletionCascade:
    torch.manual_seed(5)
    parts = dict(
        temporal=temporal(stride=32),
        vae=PVReconVAE(len(STRIDES), CHANNELS, VAEConfig(latent=8)),
        planning=planning(STRIDES),
    )
    backbone = ResNetFPN(PyramidConfig("tiny", norm_eval=False, strides=STRIDES), CHANNELS)
    backbone.requires_grad_(False)
    return CompletionCascade(backbone, RandCamMask(DropoutConfig(p_missing=1.0)), **{**parts, **stages})


def vae_inputs():
    """Maps of two scales, and the second sample's third camera missing."""
    missing = torch.zeros(2, 6, dtype=torch.bool)
    missing[1, 2] = True
    return [torch.randn(2, 6, CHANNELS, *size) for size in ((7, 13), (4, 7))], missing


def test_vae_replaces_only_what_it_is_told_by_what_the_present_cameras_suggest():
    vae = PVReconVAE(2, CHANNELS, VAEConfig(latent=8, grid=(4, 7))).eval()
    features, missing = vae_inputs()
    fine, coarse = vae(features, missing, [missing, missing & False])[0]
    assert torch.equal(coarse, features[1]) and torch.equal(fine[~missing], features[0][~missing])
    everyone = vae(features, missing, [missing, missing & False], every=True)[0]
    torch.testing.assert_close(everyone, [fine, coarse])
    for sample, camera, matters in ((1, 2, False), (1, 3, True), (0, 2, False)):
        changed = [x.clone() for x in features]
        changed[0][sample, camera] += 1.0
        again = vae(changed, missing, [missing, missing])[0][0]
        assert torch.equal(again[1, 2], fine[1, 2]) != matters


def test_what_present_cameras_suggest_hangs_on_what_they_say_not_on_how_many_they_are():
    vae = PVReconVAE(1, CHANNELS, VAEConfig(latent=8, grid=(4, 7))).eval()
    same = [torch.randn(1, 1, CHANNELS, 7, 13).expand(1, 6, -1, -1, -1)]
    one, three = torch.zeros(2, 1, 6, dtype=torch.bool)
    one[0, 2] = three[0, 1:4] = True
    few, many = (vae(same, missing, [missing])[0][0][0, 2] for missing in (three, one))
    torch.testing.assert_close(few, many)


def test_vae_fills_in_the_usual_where_nothing_is_suggested():
    vae = PVReconVAE(2, CHANNELS, VAEConfig(latent=8, grid=(7, 13))).train()
    batches = [vae_inputs() for _ in range(3)]
    for features, missing in batches:
        vae(features, missing, [missing, missing], features)
    with torch.no_grad():
        for scale in vae.scales:
            scale.decoder[-1].weight.zero_()
            scale.decoder[-1].bias.zero_()
    filled = vae.eval()(features, missing, [missing, missing])[0][0]
    usual = sum(features[0][~missing[:, 2], 2].mean(0) for features, missing in batches) / 3
    torch.testing.assert_close(filled[1, 2], usual, atol=1e-5, rtol=1e-4)


def test_vae_reports_its_losses():
    vae = PVReconVAE(2, CHANNELS, VAEConfig(latent=8, grid=(4, 7))).eval()
    features, missing = vae_inputs()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        losses = vae(features, missing, [missing, missing], features)[1]
        torch.manual_seed(3)
        reconstruction, divergence, normal = [], [], torch.distributions.Normal
        for scale, x in zip(vae.scales, features):
            mu, logvar = scale.encode(x.masked_fill(missing[:, :, None, None, None], 0), missing)
            latent = normal(mu, (0.5 * logvar).exp())
            divergence.append(torch.distributions.kl_divergence(latent, normal(0.0, 1.0)).mean())
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            error = (scale.decode(z.flatten(0, 1), x.shape[-2:]).unflatten(0, (2, 6)) - x).square()
            reconstruction.append((error[missing].mean() + error[~missing].mean()) / 2 / x.square().mean())
    torch.testing.assert_close(losses["vae_kl"], torch.stack(divergence).mean())
    torch.testing.assert_close(losses["vae_rec"], torch.stack(reconstruction).mean())
    assert vae(features, missing, [missing, missing])[1] == {}


def test_a_trajectory_ahead_is_seen_by_the_front_camera_only():
    frame = frame_of(open_drives(None)[0], 0)
    trajectory = torch.tensor([[[5.0, 0.0], [10.0, 0.0], [30.0, 0.0]]])
    points, valid = project_trajectory(trajectory, frame, stride=8)
    assert valid[0, FRONT].all() and not valid[0, BACK].any()
    u, v = points[0, FRONT].unbind(-1)
    centre = (WIDTH / 2) / 8 - 0.5
    assert (u - centre).abs().max() < 0.5  # straight ahead
    assert (v.diff() < 0).all() and v[-1] > (HEIGHT / 2) / 8 - 0.5  # rises towards the horizon and stays below it


def test_planning_guided_completion_changes_missing_cameras_only(window):
    stage = with_noise(planning(STRIDES))
    features = [torch.randn(1, 6, CHANNELS, -(-HEIGHT // s), -(-WIDTH // s)) for s in STRIDES]
    missing = torch.zeros(1, 6, dtype=torch.bool)
    frame = window.frames[-1]
    unchanged, importance = stage(features, missing, frame, window.trajectory)
    assert all(torch.equal(a, b) for a, b in zip(unchanged, features)) and importance is None
    missing[0, FRONT] = True
    guided, importance = stage(features, missing, frame, window.trajectory)
    coarse, nothing = stage(features, missing, frame)
    assert nothing is None and [tuple(i.shape) for i in importance] == [(1, 6, 7, 13), (1, 6, 4, 7)]
    for before, with_path in zip(features, guided):
        assert torch.equal(before[~missing], with_path[~missing])
    path = importance[0][0]
    difference = (guided[0] - coarse[0])[0, FRONT].abs().amax(dim=0)
    assert difference[path[FRONT] > 0.5].min() > difference[path[FRONT] < 1e-3].max()
    assert path[FRONT].max() > 0.8 and path[BACK].max() == 0


def test_missing_cameras_borrow_from_present_ones_only(window):
    stage = with_noise(planning((32,)))
    features = torch.randn(1, 6, CHANNELS, 4, 7)
    missing = torch.zeros(1, 6, dtype=torch.bool)
    missing[0, [FRONT, BACK]] = True
    first = stage([features], missing, window.frames[-1])[0][0]
    changed = features.clone()
    changed[0, BACK] += 1  # missing: FRONT must not look there
    assert torch.equal(stage([changed], missing, window.frames[-1])[0][0][0, FRONT], first[0, FRONT])
    changed = features.clone()
    changed[0, 3] += 1
    assert not torch.equal(stage([changed], missing, window.frames[-1])[0][0][0, FRONT], first[0, FRONT])


def test_a_share_of_the_training_samples_has_no_trajectory(window):
    frames = [RigFrame.cat([frame, frame]) for frame in window.frames]
    batch = RigWindow(window.images.repeat(2, 1, 1, 1, 1, 1), frames, window.trajectory.repeat(2, 1, 1))
    seen = {}
    for share in (0.0, 0.5, 1.0):
        model = cascade(trajectory_dropout=share).train()
        torch.manual_seed(0)  # at a half, the first sample loses its trajectory and the second keeps it
        importance = model(batch, drop=["CAM_FRONT"]).importance[0]
        seen[share] = [bool(own.any()) for own in importance]
    assert seen == {0.0: [True, True], 0.5: [False, True], 1.0: [False, False]}


def test_cascade_trains_every_stage(window):
    model = cascade(trajectory_dropout=0.0).train()
    output = model(window, drop=["CAM_FRONT"])
    assert set(output.losses) == {"ssl", "vae_rec", "vae_kl", "planning_guided"}
    assert output.missing.nonzero().tolist() == [[0, FRONT]]
    sum(output.losses.values()).backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert all(p.grad is None for p in model.backbone.parameters())


def test_cascade_in_evaluation_uses_no_trajectory(window):
    model = cascade().eval()
    with torch.no_grad():
        output = model(window, drop=["CAM_FRONT"])
        again = model(RigWindow(window.images, window.frames), drop=["CAM_FRONT"])
    assert output.losses == {} and output.importance is None
    for one, other, teacher in zip(output.features, again.features, output.teacher):
        assert torch.equal(one, other)
        assert torch.equal(one[~output.missing], teacher[~output.missing])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("history", [True, False])
def test_stage_2_fills_what_stage_1_leaves_empty(window, training, history):
    """Stage 1 works at the coarse scale alone, and without history not at all."""
    model = cascade(planning=None).train(training)
    seen = window if history else RigWindow(window.images[:, -1:], window.frames[-1:])
    output = model(seen, drop=["CAM_FRONT"])
    model.vae = None
    without = model(seen, drop=["CAM_FRONT"])
    same = [torch.equal(a, b) for a, b in zip(output.features, without.features)]
    assert same == [False, history]


@pytest.mark.parametrize("stage", ["temporal", "vae", "planning"])
def test_each_stage_can_be_left_out(window, stage):
    output = cascade(**{stage: None}).train()(window, drop=["CAM_BACK"])
    assert torch.isfinite(sum(output.losses.values()))


def test_nobody_missing_gives_a_zero_loss_with_a_gradient():
    features = [torch.randn(1, 6, 8, 3, 4, requires_grad=True)]
    losses = consistency_losses(features, [torch.randn(1, 6, 8, 3, 4)], torch.zeros(1, 6, dtype=torch.bool), None)
    losses["ssl"].backward()
    assert losses["ssl"] == 0 and not features[0].grad.any()


def one_missing(*cells):
    """Features (1, 2, C, 1, N) whose first camera has these cells and is missing."""
    maps = torch.tensor(cells).T[None, None, :, None]
    return torch.cat([maps, torch.full_like(maps, 9.0)], dim=1), torch.tensor([[True, False]])


def test_the_consistency_loss_is_relative_error_plus_distance_of_direction():
    """Cells by hand; a mean square of 4 for the target. Present cameras do not count."""
    target, missing = one_missing([2.0, 2.0], [2.0, -2.0])
    for factor, error in ((2.0, 1.0), (0.5, 0.25), (-1.0, 4.0 + 2.0)):  # the direction is the same, or the opposite
        loss = consistency_losses([factor * target], [target], missing, None)["ssl"]
        torch.testing.assert_close(loss, torch.tensor(error))
    turned, _ = one_missing([2.0, -2.0], [2.0, 2.0])  # a right angle
    loss = consistency_losses([turned], [target], missing, None)["ssl"]
    torch.testing.assert_close(loss, torch.tensor(2.0 + 1.0))
    both = consistency_losses([2 * target, -target], [target, target], missing, None)["ssl"]
    torch.testing.assert_close(both, torch.tensor((1.0 + 6.0) / 2))


def test_the_guided_loss_is_a_weighted_mean_of_the_relative_error():
    target, missing = one_missing([2.0, 2.0], [2.0, -2.0], [2.0, 2.0])
    x, _ = one_missing([4.0, 4.0], [2.0, -2.0], [8.0, 8.0])  # relative errors of 1, 0 and 9
    for weights, expected in (((1.0, 1.0, 1.0), 10 / 3), ((0.5, 1.0, 0.5), 2.5), ((0.1, 0.0, 0.0), 0.1)):
        importance = torch.tensor(weights).expand(1, 2, 1, 3)  # below one in sum it fades with the weights
        loss = consistency_losses([x], [target], missing, [importance])["planning_guided"]
        torch.testing.assert_close(loss, torch.tensor(expected))


def test_a_temporal_stage_at_no_scale_of_the_backbone_is_refused():
    with pytest.raises(ValueError, match="temporal.stride is 64"):
        cascade(temporal=temporal(stride=64))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_every_operation_runs_on_the_cascades_backend(window, monkeypatch, backend):
    asked = []

    def watched(operation):
        def call(*arguments, **settings):
            asked.append((operation.__name__, settings["backend"]))
            return operation(*arguments, **settings)

        return call

    operations = ("cross_camera_attention", "gated_fusion", "multi_depth_warp", "trajectory_importance")
    for module, name in itertools.product((attention, planning_guided, temporal_stage), operations):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    model = cascade(trajectory_dropout=0.0).train()
    model.backend = backend
    model(window, drop=["CAM_FRONT"])
    assert set(asked) == {(name, backend) for name in operations}


def test_weights_are_float32_or_float64(window):
    model = cascade().eval()
    expected = model(window, drop=["CAM_FRONT"])
    wide = model.double()(replace(window, images=window.images.double()), drop=["CAM_FRONT"])
    for narrow, result in zip(expected.features, wide.features):
        torch.testing.assert_close(narrow.double(), result, rtol=1e-3, atol=1e-4)
    for narrowed in ("half", "bfloat16"):
        with pytest.raises(TypeError, match="CompletionCascade keeps its weights in float32 .*autocast"):
            getattr(torch.nn.Sequential(model), narrowed)()


def test_a_window_is_of_one_batch_and_in_order(window):
    ahead = window.trajectory
    for wrong, message in (
        ((window.images[:, :2], window.frames), "3 frames for images of 2 moments"),
        ((window.images, window.frames[::-1]), r"frames\[1\] is earlier than frames\[0\]"),
        ((window.images[:, :, :4], window.frames), r"frames\[0\] has \(batch, cameras\) = \(1, 6\), needs \(1, 4\)"),
        ((window.images, window.frames, ahead.repeat(2, 1, 1)), r"trajectory has shape \(2, 6, 2\), needs \(1, F, 2\)"),
        ((window.images[0], window.frames), r"images has shape .* needs \(B, T, V, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RigWindow(*wrong)
