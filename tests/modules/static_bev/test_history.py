"""History by timestamp: what is found, what is kept, how it is stored; fusion: alignment, validity, the start."""

import pytest
import torch

from rigfuse.modules.rig import RigFrame, nuscenes_like_rig
from rigfuse.modules.static_bev.fusion import FusionConfig, TemporalFusion
from rigfuse.modules.static_bev.grid import BevGrid
from rigfuse.modules.static_bev.history import ABSENT, HistoryConfig, HistoryFeatureManager, check_intervals

GRID = BevGrid((-3.2, 3.2), (-3.2, 3.2), 0.8)
RIG = nuscenes_like_rig()


def frame(*places):
    """A batch of rigs, each as (seconds, scene, metres ahead)."""
    frames = []
    for time, scene, x in places:
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 3] = x
        frames.append(RIG.frame(pose, 1.6e9 + time, scene))
    return RigFrame.cat(frames)


def maps(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 2, *GRID.shape).contiguous()


def test_every_interval_finds_the_nearest_frame_within_the_tolerance():
    manager = HistoryFeatureManager(HistoryConfig(dtype="float32"))
    for step in range(34):
        manager.push(maps(float(step)), frame((step / 10, "a", step)))
    present = frame((3.4, "a", 34))
    history = manager.pick(present, maps(0.0))
    assert history.features[0, :, 0, 0, 0].tolist() == [27, 15, 1] and history.found.all()
    assert history.ages[0].tolist() == pytest.approx([0.7, 1.9, 3.3])
    assert history.then_T_now[0, :, 0, 3].tolist() == [7, 19, 33]
    # A tenth of a second away still counts, to the microsecond; more does not.
    edge = frame((1.5, "b", 0)), frame((2.3, "b", 0)), frame((2.300003, "b", 0))
    manager.push(maps(5.0), edge[0])
    assert manager.pick(edge[1], maps(0.0)).found.tolist() == [[True, False, False]]
    late = manager.pick(edge[2], maps(0.0))
    assert not late.found.any() and not late.features.any() and late.ages.isnan().all()


def test_only_what_can_still_be_asked_for_is_kept():
    for settings, kept, size in (
        (dict(), 34, 4), (dict(dtype="bfloat16"), 34, 2), (dict(spacing=0.2), 17, 4), (dict(frames=8), 8, 4),
    ):  # fmt: skip
        manager = HistoryFeatureManager(HistoryConfig(**dict(dtype="float32") | settings))
        for step in range(60):
            present = frame((step / 10, "a", 0))
            if step > 34 and not settings.get("frames"):
                assert manager.pick(present, maps(0.0)).found.all()
            manager.push(maps(1.0), present)
        assert abs(len(manager) - kept) <= 1, settings
        assert manager.nbytes == len(manager) * 2 * GRID.rows * GRID.columns * size
    manager = HistoryFeatureManager(HistoryConfig())
    for step in range(20):
        manager.push(maps(1.0), frame((step / 2, "a", 0)))
    assert len(manager) == 7  # two hertz


def test_samples_of_a_batch_have_pasts_of_their_own():
    manager = HistoryFeatureManager(HistoryConfig(intervals=(0.5,), dtype="float32"))
    manager.push(maps(1.0, 2.0, 3.0, 4.0), frame((0, "a", 0), (0, "b", 0), (5, "c", 0), (0, ABSENT, 0)))
    now = frame((0.5, "a", 0), (0.5, "x", 0), (0.5, "c", 0), (0.5, "d", 0))
    assert manager.pick(now, maps(*[0.0] * 4)).found[:, 0].tolist() == [True, False, False, False]
    manager.push(maps(5.0, 6.0, 7.0, 8.0), now)
    back = frame((1.0, "a", 0), (1.0, "b", 0), (5.5, "c", 0), (1.0, "d", 0))
    history = manager.pick(back, maps(*[0.0] * 4))
    assert history.features[:, 0, 0, 0, 0].tolist() == [5, 0, 0, 8]  # a lost past does not come back


def test_whole_numbers_keep_features_to_a_percent():
    features = torch.rand(2, 8, 16, 16) * torch.rand(2, 8, 1, 1) * 30
    errors = {}
    for dtype in ("bfloat16", "int8"):
        manager = HistoryFeatureManager(HistoryConfig(intervals=(0.5,), dtype=dtype))
        manager.push(features, frame((0, "a", 0), (0, "b", 0)))
        found = manager.pick(frame((0.5, "a", 0), (0.5, "b", 0)), features).features[:, 0]
        errors[dtype] = ((found - features).square().mean() / features.square().mean()).sqrt().item()
    assert 0 < errors["bfloat16"] < 0.005 and 0 < errors["int8"] < 0.01


def test_an_interval_that_no_moment_can_match_is_refused():
    config = HistoryConfig()
    check_intervals(config, [[step / 10 for step in range(36)]])
    with pytest.raises(ValueError, match=r"one 0.7 s ± 0.1 s before it \(moments are 0.5 s apart, .* is 9.5 s\)"):
        check_intervals(config, [[step / 2 for step in range(20)], [7.0], []])
    with pytest.raises(ValueError, match="one 3.3 s"):
        check_intervals(config, [[step / 10 for step in range(20)]])
    with pytest.raises(ValueError, match="spacing is 0.3, needs at most 0.2"):
        HistoryFeatureManager(HistoryConfig(spacing=0.3))


@pytest.mark.parametrize("kind", ["concat", "sum", "gate"])
def test_fusion_aligns_begins_with_the_present_and_hides_what_is_missing(kind):
    config = HistoryConfig(intervals=(0.5, 1.0), dtype="float32")
    fusion = TemporalFusion(GRID, 3, 2, FusionConfig(kind))
    past, present = torch.rand(1, 3, *GRID.shape), torch.rand(1, 3, *GRID.shape)
    manager = HistoryFeatureManager(config)
    manager.push(past, frame((0, "a", 0)))
    history = manager.pick(frame((0.5, "a", 0.8)), present)
    aligned, seen = fusion.align(history)
    assert torch.equal(aligned[0, 0, :, :, :-1], past[0, :, :, 1:]) and seen[0, 0, :, :-1].all()
    assert not seen[0, 0, :, -1].any() and not seen[0, 1].any() and not aligned[0, 1].any()
    fused = fusion(present, torch.ones(1, 1, *GRID.shape), history)
    if kind == "sum":
        both = (past[0, :, :, 1:] + present[0, :, :, :-1]) / 2
        assert torch.allclose(fused.features[0, :, :, :-1], both) and torch.equal(
            fused.features[..., -1], present[..., -1]
        )
    else:
        assert torch.allclose(fused.features, present, atol=0 if kind == "concat" else 0.05)
    if kind == "gate":
        assert torch.allclose(fused.weights.sum(1), torch.ones(1, *GRID.shape)) and not fused.weights[:, 2].any()
        assert fused.weights[0, 1, 0, 0].item() == pytest.approx(torch.tensor([4.0, 0]).softmax(0)[1].item())
    fused.features.square().sum().backward()
    assert fusion.block[0].weight.grad.isfinite().all() and fusion.block[0].weight.grad.any()
