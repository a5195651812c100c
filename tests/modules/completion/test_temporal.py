import pytest
import torch

from rigfuse.kernels import multi_depth_warp
from rigfuse.modules.completion import temporal
from rigfuse.modules.completion.temporal import (
    MotionCompensatedTemporalCompletion as V1,
)
from rigfuse.modules.completion.temporal import (
    MotionCompensatedTemporalCompletionV2 as V2,
)
from rigfuse.modules.completion.temporal import TemporalConfig, plan_attention
from rigfuse.modules.rig import NUSCENES_CAMERAS, RigFrame
from rigfuse.train.data import open_drives
from support.networks import with_noise

SMALL = dict(heads=2, queue_length=2, kv_downsample=2, stride=64)
SIZE = (14, 25)  # 900×1600 at stride 64
FRONT, FRONT_LEFT, FRONT_RIGHT, BACK = (
    NUSCENES_CAMERAS.index(f"CAM_{name}") for name in ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK")
)


def small(kind, cameras=NUSCENES_CAMERAS, backend=None, **settings):
    return kind(32, TemporalConfig(**SMALL | settings), cameras=cameras, backend=backend)


@pytest.fixture(scope="module")
def frames() -> list[RigFrame]:
    """Four consecutive moments of a batch of two drives."""
    drives = open_drives(None)[:2]
    return [RigFrame.cat([drive[index].frame for drive in drives]) for index in range(4)]


def maps(samples=2, **like):
    return torch.randn(samples, 6, 32, *SIZE, **like)


def missing_cameras(*pairs, samples=2):
    mask = torch.zeros(samples, 6, dtype=torch.bool)
    for sample, camera in pairs:
        mask[sample, camera] = True
    return mask


NOBODY = missing_cameras()


def run(module, frames, history, present, missing):
    module.reset_history()
    for frame, features in zip(frames, history):
        module(features, NOBODY[: len(features)], frame)
    return module(present, missing, frames[len(history)])


def test_nothing_to_do_returns_the_input_bit_for_bit(frames):
    module, features, missing = with_noise(small(V2)), maps(), missing_cameras((0, FRONT))
    assert torch.equal(module(features, missing, frames[0]), features)  # no history
    assert torch.equal(module(features, NOBODY, frames[1]), features)  # nobody is missing
    disabled = small(V2, enable=False)
    run(disabled, frames, [features], features, missing)
    assert torch.equal(disabled(features, missing, frames[2]), features) and not disabled.history.frames


def test_only_missing_cameras_change(frames):
    features, missing = maps(), missing_cameras((0, FRONT), (1, BACK), (1, FRONT_LEFT))
    completed = run(with_noise(small(V1)), frames, [maps(), maps()], features, missing)
    assert torch.equal(completed[~missing], features[~missing])
    assert (completed[missing] - features[missing]).abs().flatten(1).amax(1).gt(1e-3).all()


def test_weights_are_interchangeable_and_equal_topologies_agree(frames):
    v1 = with_noise(small(V1, topology="neighbours"))
    v2 = small(V2)
    v2.load_state_dict(v1.state_dict())
    v1_global = small(V1)
    v1_global.load_state_dict(v2.state_dict())
    history, features, missing = [maps(), maps()], maps(), missing_cameras((0, FRONT), (1, BACK))
    results = [run(module, frames, history, features, missing) for module in (v1, v2, v1_global)]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_v2_reads_and_warps_only_what_its_table_names(frames, monkeypatch):
    """FRONT's neighbours are FRONT_LEFT and FRONT_RIGHT: what BACK saw cannot matter, and is not warped."""
    warped = []

    def counting(features, *arguments, **settings):
        warped.append(features)
        return multi_depth_warp(features, *arguments, **settings)

    monkeypatch.setattr(temporal, "multi_depth_warp", counting)
    module = with_noise(small(V2))
    history, features, missing = maps(), maps(), missing_cameras((1, FRONT))
    first = run(module, frames, [history], features, missing)
    assert len(warped) == 1 and torch.equal(warped[0], history[1, [FRONT, FRONT_LEFT, FRONT_RIGHT]])
    for camera, matters in ((BACK, False), (FRONT_LEFT, True)):
        changed = history.clone()
        changed[1, camera] += 1
        assert torch.equal(run(module, frames, [changed], features, missing), first) != matters
    changed = history.clone()
    changed[0] += 1  # the other sample
    assert torch.equal(run(module, frames, [changed], features, missing), first)


def test_a_camera_missing_then_is_not_read(frames):
    module, history, features = with_noise(small(V2)), maps(), maps()
    missing = missing_cameras((0, FRONT))

    def complete(past):
        module.reset_history()
        module(past, missing_cameras((0, FRONT_LEFT)), frames[0])
        return module(features, missing, frames[1])

    first, changed = complete(history), history.clone()
    changed[0, FRONT_LEFT] = float("nan")
    assert torch.equal(complete(changed), first) and first.isfinite().all()


def test_a_scene_change_ends_the_history_of_its_sample_only(frames):
    module, features = with_noise(small(V1)), maps()
    missing = missing_cameras((0, FRONT), (1, FRONT))
    past = frames[0]
    other_scene = RigFrame(past.image_T_ego, past.world_T_ego, past.timestamp, ("another", past.scene[1]))
    module(maps(), NOBODY, other_scene)
    completed, helped = module.complete(features, missing, frames[1], module.history)
    assert helped.nonzero().tolist() == [[1, FRONT]]
    assert torch.equal(completed[0], features[0]) and not torch.equal(completed[1], features[1])


def test_samples_of_a_batch_do_not_see_one_another(frames):
    module, history, features = with_noise(small(V2)), maps(), maps()
    missing = missing_cameras((0, FRONT), (1, BACK))
    together = run(module, frames, [history], features, missing)
    alone = [RigFrame(f.image_T_ego[1:], f.world_T_ego[1:], f.timestamp[1:], f.scene[1:]) for f in frames]
    completed = run(module, alone, [history[1:]], features[1:], missing[1:])
    torch.testing.assert_close(completed, together[1:], atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_parameter_and_stop_at_the_history(frames):
    module = with_noise(small(V2))
    history, features = maps(requires_grad=True), maps(requires_grad=True)
    missing = missing_cameras((0, FRONT), (1, BACK))
    completed = run(module, frames, [history], features, missing)
    weight = torch.randn_like(completed)
    (completed * weight).sum().backward()
    for name, parameter in module.named_parameters():
        # a bias of the keys shifts every score of a query alike, and the softmax does not see it
        if name != "attention.key.bias":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert history.grad is None
    torch.testing.assert_close(features.grad[~missing], weight[~missing], rtol=0, atol=0)


def test_a_standing_vehicle_is_reminded_of_what_it_saw(frames, monkeypatch):
    """Identity motion and an own-camera topology: each key is a cell of the history, where it was."""
    module = with_noise(small(V1, topology="own"))
    seen = {}

    def watching(*arguments, offsets, **settings):
        warped, coverage = multi_depth_warp(*arguments, offsets=torch.zeros_like(offsets), **settings)
        seen.update(warped=warped, coverage=coverage)
        return warped, coverage

    monkeypatch.setattr(temporal, "multi_depth_warp", watching)
    standing = RigFrame(frames[0].image_T_ego, frames[0].world_T_ego, frames[0].timestamp + 0.5, frames[0].scene)
    history = maps()
    module(history, NOBODY, frames[0])
    module(maps(), missing_cameras((1, BACK)), standing)
    torch.testing.assert_close(seen["warped"][0], history[1, BACK], atol=1e-4, rtol=1e-4)
    assert seen["coverage"].mean() > 0.99


def test_without_motion_the_same_cell_is_remembered(frames):
    """However far the vehicle went: what an untrained network begins from is the own past as it was."""
    history, missing = maps(), missing_cameras((0, FRONT), (1, BACK))
    completed = run(small(V2, motion=False), frames, [history], maps(), missing)
    similarity = torch.cosine_similarity(completed[missing], history[missing], dim=1)
    assert similarity.min() > 0.95
    moved = run(small(V2), frames, [history], maps(), missing)
    assert torch.cosine_similarity(moved[missing], history[missing], dim=1).mean() < 0.9


def test_an_untrained_network_remembers_what_the_camera_saw(frames):
    """It starts from the rigid warp of the newest moment in which the camera was there."""
    standing = [
        RigFrame(frames[0].image_T_ego, frames[0].world_T_ego, frames[0].timestamp + 0.5 * i, frames[0].scene)
        for i in range(3)
    ]
    older, newer, features, missing = maps(), maps(), maps(), missing_cameras((0, FRONT), (1, BACK))
    module = small(V2)
    module(older, NOBODY, standing[0])
    module(newer, missing_cameras((1, BACK)), standing[1])
    completed = module(features, missing, standing[2])
    for expected, sample, camera in ((newer, 0, FRONT), (older, 1, BACK)):
        similarity = torch.cosine_similarity(completed[sample, camera], expected[sample, camera], dim=0)
        assert similarity.min() > 0.98


def test_history_in_bfloat16_stays_close(frames):
    history, features, missing = [maps(), maps()], maps(), missing_cameras((0, FRONT))
    narrow = with_noise(small(V2, history_dtype="bfloat16"))
    wide = with_noise(small(V2))
    completed = [run(module, frames, history, features, missing) for module in (narrow, wide)]
    assert narrow.history.frames[0].features.dtype == torch.bfloat16 and completed[0].dtype == torch.float32
    torch.testing.assert_close(*completed, atol=0.1, rtol=0.05)


def test_backends_agree(frames):
    history, features, missing = [maps()], maps(), missing_cameras((0, FRONT))
    module, completed = with_noise(small(V2, backend="torch")), []
    for backend in ("torch", "triton"):
        module.backend = backend
        completed.append(run(module, frames, history, features, missing))
    torch.testing.assert_close(*completed, atol=1e-4, rtol=1e-4)


def test_autocast_and_channels_last(frames):
    module = with_noise(small(V2))
    history, features, missing = maps(), maps(), missing_cameras((0, FRONT))
    expected = run(module, frames, [history], features, missing)
    dense = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 6))
    torch.testing.assert_close(run(module, frames, [history], dense, missing), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completed = run(module, frames, [history], features, missing)
    assert completed.dtype == torch.float32
    torch.testing.assert_close(completed, expected, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(features=torch.zeros(2, 5, 32, 4, 4)), ValueError, r"features has shape \(2, 5, 32, 4, 4\), needs"),
        (dict(features=torch.zeros(2, 6, 16, 4, 4)), ValueError, r"needs \(B, 6, 32, H, W\)"),
        (dict(missing=torch.zeros(2, 6)), TypeError, "missing is float32, needs bool"),
        (dict(missing=NOBODY[:1]), ValueError, r"missing has shape \(1, 6\), needs \(B, V\)"),
    ],
)
def test_bad_input(frames, change, error, message):
    arguments = dict(features=maps(), missing=NOBODY, frame=frames[0])
    with pytest.raises(error, match=message):
        small(V1)(**{**arguments, **change})


def test_bad_settings():
    for settings, message in [
        (dict(topology="neighbors"), "no topology 'neighbors'; choose one of global, neighbours"),
        (dict(heads=5), "heads is 5, needs to divide the 32 channels"),
        (dict(kv_downsample=0), "kv_downsample is 0"),
        (dict(queue_length=0), "length is 0"),
        (dict(topology="neighbours", cameras=("CAM_FRONT", "CAM_TOP")), "CAM_TOP|CAM_FRONT_LEFT"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(V1, **settings)


def test_the_plan_lists_each_needed_map_once(frames):
    module = small(V1, topology="global")
    module(maps(), missing_cameras((0, BACK)), frames[0])
    module(maps(), NOBODY, frames[1])
    plan = plan_attention(missing_cameras((0, FRONT), (0, BACK)), module.history.frames, module._table)
    assert plan.queries.tolist() == [[0, FRONT], [0, BACK]]
    assert [index.tolist() for index in plan.maps] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
    assert sorted(plan.block_table[0].tolist()) == [-1, *range(11)]
