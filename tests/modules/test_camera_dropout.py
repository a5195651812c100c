"""RandCamMask: exact, fair, repeatable."""

import pytest
import torch

from rigfuse.modules.camera_dropout import DropoutConfig, RandCamMask
from rigfuse.modules.rig import NUSCENES_CAMERAS


def always(**counts) -> RandCamMask:
    return RandCamMask(DropoutConfig(p_missing=1.0, **counts))


def images(batch=3, cameras=6):
    return torch.rand(batch, cameras, 3, 4, 5) + 0.5


def test_missing_cameras_are_zero_and_the_others_untouched():
    batch = images(64)
    batch[:, :, :, 0, 0] = torch.nan
    before = batch.clone()
    masked, missing = RandCamMask()(batch)
    assert missing.any() and not missing.all()
    assert (masked[missing] == 0).all()
    torch.testing.assert_close(masked[~missing], before[~missing], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(batch, before, rtol=0, atol=0, equal_nan=True)


def test_the_draw_is_fair_and_without_replacement():
    count = 20_000
    batch = torch.zeros(count, 6, 3, 1, 1)
    _, missing = RandCamMask()(batch, generator=torch.Generator().manual_seed(1))
    dropped = missing.sum(1)
    # five standard deviations of each share
    assert abs((dropped > 0).double().mean() - 0.6) < 5 * (0.6 * 0.4 / count) ** 0.5
    assert abs((dropped == 1).double().mean() - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5
    assert dropped.max() == 2
    assert (missing.double().mean(0) - 0.6 * 1.5 / 6).abs().max() < 5 * (0.15 * 0.85 / count) ** 0.5
    pairs = missing[dropped == 2].double()
    together = (pairs.T @ pairs / len(pairs)).triu(1)[torch.ones(6, 6).triu(1) > 0]
    assert (together - 1 / 15).abs().max() < 5 * (1 / 15 / len(pairs)) ** 0.5


@pytest.mark.parametrize("count", [0, 3, 6])
def test_exact_counts(count):
    _, missing = always(n_min=count, n_max=count)(images(50))
    assert (missing.sum(1) == count).all()


def test_a_generator_repeats_the_draw():
    mask, batch = RandCamMask(), images(40)
    draws = [mask(batch, generator=torch.Generator().manual_seed(seed))[1] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_evaluation_drops_only_what_is_listed():
    mask, batch = always().eval(), images()
    unchanged, missing = mask(batch)
    assert unchanged is batch and not missing.any()
    masked, missing = mask(batch, drop=["CAM_BACK", "CAM_FRONT"])
    assert missing.tolist() == [[True, False, False, False, False, True]] * 3
    assert (masked[:, [0, 5]] == 0).all() and torch.equal(masked[:, 1:5], batch[:, 1:5])
    per_sample = torch.rand(3, 6) < 0.5
    assert torch.equal(mask(batch, drop=per_sample)[1], per_sample)


def test_a_list_replaces_the_draw_in_training_too():
    assert not always()(images(), drop=[])[1].any()
    assert always().faults(2, 3, drop=["CAM_BACK"])[..., 5].tolist() == [[False, False, True]] * 2


# ---- faults that last


def drawn(count=20_000, moments=5, seed=1, **settings):
    config = DropoutConfig(**dict(p_missing=1.0, p_from_start=0.0, p_no_history=0.0) | settings)
    return RandCamMask(config).faults(count, moments, generator=torch.Generator().manual_seed(seed))


def lost_before(missing):
    """For each camera that is missing now, in how many of the moments just before it was missing too."""
    before = missing[:, :-1].flip(1).transpose(1, 2)[missing[:, -1]]  # (Nq, T), the latest first
    lost = before.long().cumprod(dim=1).sum(dim=1)
    assert torch.equal(before.long().sum(dim=1), lost)  # without a gap
    return lost


def share(values, value):
    return (values == value).double().mean().item()


def test_a_fault_of_two_or_three_moments_is_met_at_any_of_them():
    missing = drawn(sticky=(2, 3))
    lost, tolerance = lost_before(missing), 5 * (0.25 / 20_000) ** 0.5
    for moments, chance in enumerate((1 / 4 + 1 / 6, 1 / 4 + 1 / 6, 1 / 6, 0.0)):
        assert abs(share(lost, moments) - chance) < tolerance
    assert not (missing[:, :-1] & ~missing[:, -1:]).any()  # who is there now was there before
    assert share(lost_before(drawn(sticky=(1, 1))), 0) == 1


def test_some_faults_are_as_old_as_the_history_and_some_samples_have_none():
    lost = lost_before(drawn(sticky=(1, 1), p_from_start=0.2))
    assert abs(share(lost, 4) - 0.2) < 0.02 and share(lost, 4) + share(lost, 0) == 1
    missing = drawn(sticky=(1, 1), p_no_history=0.3)
    empty = missing[:, :-1].flatten(1).all(dim=1)
    assert abs(empty.double().mean() - 0.3) < 0.02
    assert not missing[~empty][:, :-1].any() and not missing[empty][:, -1].all()


def test_the_curriculum_rises_with_the_batches_drawn_and_survives_a_resume():
    config = DropoutConfig(p_missing=0.6, n_max=2, p_first=0.15, ramp_steps=100)
    mask, count = RandCamMask(config), 4000

    def figures():
        now = mask.faults(count, 1)[:, -1].sum(dim=1)
        return (now > 0).double().mean().item(), now.max().item()

    torch.manual_seed(0)
    chance, most = figures()
    assert abs(chance - 0.15) < 0.03 and most == 1
    mask.drawn.fill_(40)
    chance, most = figures()
    assert abs(chance - (0.15 + 0.4 * 0.45)) < 0.04 and most == 1
    assert mask.drawn == 41
    resumed = RandCamMask(config)
    resumed.load_state_dict(mask.state_dict())
    assert resumed.drawn == 41
    for step in (100, 1000):
        mask.drawn.fill_(step)
        chance, most = figures()
        assert abs(chance - 0.6) < 0.04 and most == 2
    mask.eval().faults(count, 1)
    assert mask.drawn == 1001  # what is not drawn does not count


def test_a_mask_may_say_every_moment():
    mask = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(always().faults(3, 4, drop=mask), mask)
    assert torch.equal(always()(images(), drop=mask[:, 0])[1], mask[:, 0])


def test_gradients_and_memory_format():
    batch = images().requires_grad_()
    masked, missing = always()(batch)
    masked.sum().backward()
    assert torch.equal(batch.grad, (~missing)[:, :, None, None, None].float().expand_as(batch))
    channels_last = torch.rand(2, 6, 4, 5, 3).movedim(-1, 2)
    masked, _ = always()(channels_last.half())
    assert masked.stride() == channels_last.stride() and masked.dtype == torch.float16


def test_other_rigs():
    mask = RandCamMask(DropoutConfig(1.0, 1, 1), cameras=("LEFT", "RIGHT"))
    assert mask(images(cameras=2), drop=["RIGHT"])[1][0].tolist() == [False, True]


def test_bad_input_says_what_is_needed():
    mask = RandCamMask()
    with pytest.raises(ValueError, match="p_missing is 1.5"):
        RandCamMask(DropoutConfig(1.5))
    for settings, message in [
        (dict(p_no_history=-0.1), "p_no_history is -0.1"),
        (dict(sticky=(0, 3)), r"sticky is \(0, 3\), needs at least 1 moment"),
        (dict(sticky=(3, 2)), "and to rise"),
        (dict(ramp_steps=-1), "ramp_steps is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RandCamMask(DropoutConfig(**settings))
    for n_min, n_max in ((-1, 2), (3, 2), (1, 7)):
        with pytest.raises(ValueError, match="needs 0 ≤ n_min ≤ n_max ≤ 6 cameras"):
            RandCamMask(DropoutConfig(0.5, n_min, n_max))
    with pytest.raises(ValueError, match=r"needs \(B, 6, 3, H, W\)"):
        mask(images(cameras=5))
    with pytest.raises(ValueError, match="no camera 'FRONT'; choose one of " + ", ".join(NUSCENES_CAMERAS)):
        mask(images(), drop=["FRONT"])
    with pytest.raises(ValueError, match=r"drop has shape \(6,\)"):
        mask(images(), drop=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(TypeError, match="needs bool or camera names"):
        mask(images(), drop=torch.zeros(3, 6))
    with pytest.raises(TypeError, match="the string 'CAM_BACK'"):
        mask(images(), drop="CAM_BACK")
