"""Driving with cameras missing, with completion in front of the head and without."""

import math

import pytest
import torch

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive import experiment as driving_experiment
from rigfuse.train.systems.sparse_drive.evaluate import Fault, drive, look, masked_by_token

SMALL = (
    "data.image_size=36,64", "data.depth=false", "model.head.detection.anchors=16", "model.head.detection.kept=8",
    "model.head.lines.anchors=6", "model.head.lines.kept=3", "model.head.lines.points=4", "model.head.motion.agents=6",
    "results.apart=0",  # the scores of all instances are compared
)  # fmt: skip
VERSIONS = ("v1", "v2", "v3")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings_of(name, root, cache):
    made = apply_options(experiment(name), SMALL)
    made.data.root, made.data.cache = str(root), str(cache)
    check(made)
    return made


@pytest.fixture(scope="module")
def plain(small_world, cache):
    settings = settings_of("sparsedrive_small_stage2_tiny", small_world, cache)
    _, validation = settings.build_data()
    batches = [settings.collate([validation[0, index]]).to("cpu") for index in range(3)]
    return settings, settings.build_model().eval(), batches


def completed(version, plain, small_world, cache):
    """A model with completion, with the weights of the plain one."""
    settings = settings_of(f"sparsedrive_small_stage2_{version}_tiny", small_world, cache)
    model = settings.build_model().eval()
    missing, unexpected = model.load_state_dict(plain[1].state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} <= {"temporal", "vae", "planning", "dropout"}
    return model


def scores(model, batches, see=look, settings=None):
    return torch.stack([seen.result.class_scores.sort().values for seen in drive(model, batches, settings, see)])


@pytest.mark.parametrize("version", VERSIONS)
def test_where_nothing_is_missing_completion_changes_nothing(version, plain, small_world, cache):
    settings, model, batches = plain
    other = completed(version, plain, small_world, cache)
    expected = scores(model, batches, settings=settings.results)
    torch.testing.assert_close(scores(other, batches, settings=settings.results), expected, rtol=1e-4, atol=1e-6)
    lost = scores(other, batches, Fault(("CAM_FRONT",)), settings.results)
    assert not torch.allclose(lost, expected, rtol=1e-4)


@pytest.mark.parametrize("version", ("none", "v2", "v3"))
def test_pixels_of_a_missing_camera_do_not_count(version, plain, small_world, cache):
    settings, model, batches = plain
    model = model if version == "none" else completed(version, plain, small_world, cache)
    fault = Fault(("CAM_BACK",))
    before = scores(model, batches, fault, settings.results)
    camera = NUSCENES_CAMERAS.index("CAM_BACK")
    kept = [batch.images.clone() for batch in batches]
    for batch in batches:
        batch.images[:, :, camera] = torch.randn_like(batch.images[:, :, camera])
    after = scores(model, batches, fault, settings.results)
    for batch, images in zip(batches, kept):
        batch.images = images
    assert torch.equal(before, after)


def test_black_is_something_else_than_nobody(plain):
    settings, model, batches = plain
    hidden, black = (
        scores(model, batches, Fault(("CAM_BACK",), hide=hide), settings.results) for hide in (True, False)
    )
    assert not torch.allclose(hidden, black, rtol=1e-4)


def test_a_fault_comes_and_goes(plain):
    _, model, batches = plain
    for lasting, expected in ((0, [True] * 3), (1, [False, True, False]), (2, [False, False, True])):
        found = [not Fault(("CAM_BACK",), lasting)(model, batch)[2].all().item() for batch in batches]
        assert found == expected


def test_the_masked_protocol_is_the_same_every_time(plain):
    settings, model, batches = plain
    config = experiment("sparsedrive_small_stage2_v2").model.dropout
    masks = [[masked_by_token(config)(model, batch)[2].tolist() for batch in batches] for _ in range(2)]
    assert masks[0] == masks[1]
    assert all(4 <= sum(there) <= 6 for (there,) in masks[0])


def test_training_has_all_losses_and_a_frozen_backbone(plain, small_world, cache):
    from rigfuse.train.optim import build_optimizer, set_training

    settings = settings_of("sparsedrive_small_stage2_v2_tiny", small_world, cache)
    apply_options(
        settings, ["data.depth=true", "model.planning.enable=true", "model.planning.trajectory_source=predicted"]
    )
    training, _ = settings.build_data()
    model = settings.build_model()
    build_optimizer(model, settings.optim, 1)
    set_training(model)
    losses = model(settings.collate([training[0, 0]]).to("cpu")).losses
    assert losses.keys() == settings.losses.keys() and all(loss.isfinite() for loss in losses.values())
    sum(settings.losses[name] * loss for name, loss in losses.items()).backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"temporal", "vae", "planning", "head", "depth"}


@pytest.mark.parametrize(
    "reference, kept",
    [({}, True), (dict(nds=0.41), True), (dict(nds=0.42), False), (dict(l2=0.99), True), (dict(l2=0.9), False)],
)
def test_who_lost_too_much_with_all_cameras_is_never_the_best(reference, kept, monkeypatch):
    made = experiment("sparsedrive_small_stage2_v2_tiny")
    for name, value in reference.items():
        setattr(made.evaluation, f"reference_{name}", value)
    made.metric = "guarded/NDS"
    check(made)
    whole, masked = {"NDS": 0.4, "plan/L2/mean": 1.0}, {"NDS": 0.3, "plan/L2/mean": 2.0}
    found = iter([whole, masked])
    monkeypatch.setattr(driving_experiment, "evaluate_driving", lambda *arguments, **options: dict(next(found)))
    figures = made.evaluate(None, None)
    assert figures["masked/NDS"] == 0.3 and figures["NDS"] == 0.4
    assert figures["guarded/NDS"] == 0.3 if kept else math.isnan(figures["guarded/NDS"])
