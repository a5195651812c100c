"""One pass of the backbone, for training on windows and for a rig that is running."""

import itertools

import pytest
import torch

from rigfuse.modules.backbones import PyramidConfig, ResNetFPN
from rigfuse.modules.camera_dropout import DropoutConfig, RandCamMask
from rigfuse.modules.completion.cascade import CompletionCascade
from rigfuse.modules.completion.planning_guided import PlanningConfig, PlanningGuidedCompletion
from rigfuse.modules.completion.temporal import MotionCompensatedTemporalCompletionV2, TemporalConfig
from rigfuse.modules.completion.vae import PVReconVAE, VAEConfig
from rigfuse.modules.rig import ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.window import RigWindow
from rigfuse.train.data import open_drives

CHANNELS, STRIDES, WIDTH, HEIGHT = 32, (16, 32), 104, 64
FRONT, FRONT_LEFT, FRONT_RIGHT, BACK_LEFT, BACK_RIGHT, BACK = range(6)


def cascade(history=2, vae=None, **backbone) -> CompletionCascade:
    """With a backbone that learns."""
    torch.manual_seed(5)
    config = TemporalConfig(heads=2, kv_downsample=2, stride=32, queue_length=history)
    model = CompletionCascade(
        ResNetFPN(PyramidConfig("tiny", **dict(frozen_stages=-1, strides=STRIDES) | backbone), CHANNELS),
        RandCamMask(DropoutConfig()),
        MotionCompensatedTemporalCompletionV2(CHANNELS, config),
        vae,
        PlanningGuidedCompletion(STRIDES, CHANNELS, PlanningConfig(heads=2, kv_downsample=2, sigma=16.0)),
        trajectory_dropout=0.0,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # what training starts from zero would hide what comes before it
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    return model


def moments(count, *, changed=()) -> list[RigFrame]:
    """Moments of a batch of two drives; the second one is in another scene from each index in `changed` on."""
    drives = open_drives(None)[:2]
    rig = nuscenes_like_rig().augmented(ImageAugmentation(resize=WIDTH / 1600, crop=(0, 0, WIDTH, HEIGHT)))
    frames = []
    for index in range(count):
        frame = RigFrame.cat([drive[index].frame for drive in drives])
        scene = f"drive-{sum(index >= other for other in changed)}"
        views = rig.image_T_ego.expand(2, -1, -1, -1)
        frames.append(RigFrame(views, frame.world_T_ego, frame.timestamp, (frame.scene[0], scene)))
    return frames


def window(count, dtype=torch.float32, **settings) -> RigWindow:
    images = torch.randn(2, count, 6, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    ahead = torch.stack([torch.arange(1, 7) * 4.0, torch.zeros(6)], dim=-1).expand(2, -1, -1)
    return RigWindow(images, moments(count, **settings), ahead)


def faults(*missing, moments):
    """(2, moments, 6) bool: (sample, moment, camera) each."""
    mask = torch.zeros(2, moments, 6, dtype=torch.bool)
    for sample, moment, camera in missing:
        mask[sample, moment, camera] = True
    return mask


DROPPED = faults((0, 2, FRONT), (1, 2, BACK), (1, 2, BACK_LEFT), (1, 1, BACK), (1, 1, FRONT_LEFT), moments=3)


def images_seen(model):
    """How many images each pass of the backbone takes, as it goes on."""
    counts = []
    model.backbone.register_forward_pre_hook(lambda _, arguments: counts.append(len(arguments[0])))
    return counts


def step(model, batch, drop):
    model.zero_grad()
    torch.manual_seed(0)  # of the VAE's noise
    output = model(batch, drop=drop)
    sum(output.losses.values()).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_one_pass_and_two_give_the_same_outputs_and_gradients(monkeypatch):
    model = cascade(vae=PVReconVAE(len(STRIDES), CHANNELS, VAEConfig(latent=8))).double().train()
    batch = window(3, torch.float64)
    once, gradients = step(model, batch, DROPPED)
    monkeypatch.setattr(CompletionCascade, "_one_pass", lambda _: False)
    twice, expected = step(model, batch, DROPPED)
    for part in ("features", "original", "teacher", "importance"):
        for a, b in zip(getattr(once, part), getattr(twice, part)):
            torch.testing.assert_close(a, b, msg=part)
    assert once.losses.keys() == twice.losses.keys()
    for name, loss in once.losses.items():
        torch.testing.assert_close(loss, twice.losses[name], msg=name)
    assert gradients.keys() == expected.keys() and any(name.startswith("backbone") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_backbone_sees_each_image_once_and_of_the_past_only_what_helps():
    model = cascade().train()
    counts = images_seen(model)
    model(window(3), drop=DROPPED)
    # FRONT and its neighbours; BACK, BACK_LEFT, FRONT_LEFT, BACK_RIGHT, of which two were missing in the second moment
    assert counts == [12, 1, 3 + 4, 3 + 2]
    counts.clear()
    model(window(3), drop=[])
    assert counts == [12]


def test_what_is_too_old_for_the_history_is_not_looked_at():
    model = cascade(history=1).train()
    counts = images_seen(model)
    model(window(3), drop=DROPPED)
    assert counts == [12, 1, 3 + 2]


def test_statistics_of_the_batch_need_two_passes():
    model = cascade(norm_eval=False).train()
    counts = images_seen(model)
    model(window(3), drop=DROPPED)
    assert counts == [12, 12, 12, 12]


@pytest.mark.parametrize("norm_eval", [True, False])
def test_the_teacher_gives_no_gradient(norm_eval):
    output = cascade(norm_eval=norm_eval).train()(window(1), drop=["CAM_FRONT"])
    assert not any(x.requires_grad for x in output.teacher) and all(x.requires_grad for x in output.original)


def test_maps_keep_the_fast_memory_format():
    output = cascade().train()(window(2), drop=["CAM_FRONT"])
    for x in itertools.chain(output.original, output.teacher):
        assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_a_running_rig_is_completed_as_its_windows_are():
    """Seven moments of two samples; one changes its scene on the way; cameras come and go."""
    count, length = 7, 2
    batch, model = window(count, changed=(4,)), cascade(history=length).eval()
    generator = torch.Generator().manual_seed(3)
    missing = torch.rand(2, count, 6, generator=generator) < 0.3
    missing[:, 5] = False  # nobody is missing
    counts, completed = images_seen(model), []
    with torch.no_grad():
        for index, frame in enumerate(batch.frames):
            absent = missing[:, index]
            images = batch.images[:, index].masked_fill(absent[:, :, None, None, None], torch.nan)  # is not read
            completed.append(model.stream(images, absent, frame))
        present = [12 - int(missing[:, index].sum()) for index in range(count)]
        assert counts == [n for index in range(count) for n in ((12,) if index == 5 else (1, present[index]))]
        helped = 0
        for index in range(count):
            first = max(index - length, 0)
            part = RigWindow(batch.images[:, first : index + 1], batch.frames[first : index + 1])
            expected = model(part, drop=missing[:, first : index + 1])
            helped += not torch.equal(expected.features[1], expected.original[1])
            for a, b in zip(completed[index], expected.features):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert helped >= 5
    alone = model.stream(batch.images[:, 4], missing[:, 4], batch.frames[4])  # back in time: no history
    model.temporal.reset_history()
    torch.testing.assert_close(alone, model.stream(batch.images[:, 4], missing[:, 4], batch.frames[4]))


def test_the_past_of_another_scene_does_not_reach_a_running_rig():
    model, frames = cascade().eval(), moments(2, changed=(1,))
    images = window(2).images
    absent = faults((0, 0, FRONT), (1, 0, FRONT), moments=1)[:, 0]

    def run(past):
        model.temporal.reset_history()
        model.stream(past, torch.zeros_like(absent), frames[0])
        return model.stream(images[:, 1], absent, frames[1])[1]

    with torch.no_grad():
        first, other = run(images[:, 0]), run(images[:, 0] + 1)
    assert torch.equal(first[1], other[1]) and not torch.equal(first[0, FRONT], other[0, FRONT])
