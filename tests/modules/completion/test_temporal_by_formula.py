"""Stage 1 against formulas: six cameras along a wall at a listed depth, motion in whole and half cells."""

from dataclasses import replace

import pytest
import torch

from rigfuse.modules.attention import CameraAttention
from rigfuse.modules.completion import temporal
from rigfuse.modules.completion.temporal import MotionCompensatedTemporalCompletion, TemporalConfig
from support.networks import with_noise
from support.wall import DISTANCE, STRIDE, wall_frame

SIZE = (3, 12)  # cells
FRONT, LEFT, RIGHT = 0, 1, 2
NOBODY = torch.zeros(1, 6, dtype=torch.bool)


def remembering(**settings) -> MotionCompensatedTemporalCompletion:
    """As training starts, with the gate wide open: what comes out is the camera's own past, warped."""
    torch.manual_seed(0)
    chosen = dict(topology="own", heads=2, queue_length=3, kv_downsample=2, stride=STRIDE, depths=(DISTANCE,))
    module = MotionCompensatedTemporalCompletion(32, TemporalConfig(**chosen | settings))
    torch.nn.init.zeros_(module.gate[-1].weight)
    torch.nn.init.constant_(module.gate[-1].bias, 100.0)
    return module


def maps(seed=0):
    return torch.randn(1, 6, 32, *SIZE, generator=torch.Generator().manual_seed(seed))


def without(*cameras):
    missing = NOBODY.clone()
    missing[:, list(cameras)] = True
    return missing


def completed(module, then, past, now, *, features=None, gone=()):
    """FRONT's map after one moment `past` at the frame `then`."""
    module.reset_history()
    module(past, without(*gone), then)
    return module(maps(9) if features is None else features, without(FRONT), now)[0, FRONT]


@pytest.mark.parametrize("cells, shift", [(1, 0), (3, 0), (-2, 0), (0, 2), (1, -3)])
def test_the_past_is_moved_by_the_ego_motion_and_between_the_two_images(cells, shift):
    past = maps()
    result = completed(remembering(), wall_frame(0, SIZE, shift=shift), past, wall_frame(cells, SIZE, time=0.5))
    move, width = cells + shift, SIZE[1]
    first, last = max(0, -move), width - max(0, move)
    expected = past[0, FRONT, :, :, first + move : last + move]
    torch.testing.assert_close(result[..., first:last], expected, atol=1e-4, rtol=1e-4)
    outside = torch.cat([result[..., :first], result[..., last:]], dim=-1)
    torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-4, rtol=0)


def test_what_the_warp_saw_in_part_counts_whole():
    """Half a cell of motion: between two cells their mean, at the border of the image the cell that was there."""
    past = maps()
    result = completed(remembering(), wall_frame(0, SIZE), past, wall_frame(0.5, SIZE, time=0.5))
    own = past[0, FRONT]
    torch.testing.assert_close(result[..., :-1], (own[..., :-1] + own[..., 1:]) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result[..., -1], own[..., -1], atol=1e-3, rtol=1e-3)


def test_depths_are_blended_by_their_weights():
    module, past = remembering(depths=(DISTANCE, 2 * DISTANCE)), maps()
    with torch.no_grad():
        module.depth.bias.copy_(torch.tensor([0.0, 3.0]).log1p())  # shares of 1 to 4
    result = completed(module, wall_frame(0, SIZE), past, wall_frame(2, SIZE, time=0.5))
    own = past[0, FRONT]
    torch.testing.assert_close(result[..., :-2], 0.2 * own[..., 2:] + 0.8 * own[..., 1:-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axis, move", [(0, 1e3), (0, -1e3), (1, 1e3)])
def test_the_learned_offset_is_bounded(axis, move):
    module, past = remembering(max_offset=2.0), maps()
    with torch.no_grad():
        module.offset.bias[axis] = move
    result = completed(module, wall_frame(0, SIZE), past, wall_frame(0, SIZE, time=0.5))
    two = 2 if move > 0 else -2
    expected = past[0, FRONT].roll(-two, dims=2 - axis)
    inside = (slice(None), slice(0, SIZE[0] - 2 * axis), slice(None) if axis else slice(2, -2))
    torch.testing.assert_close(result[inside], expected[inside], atol=1e-4, rtol=1e-4)


def test_depth_and_offset_are_said_by_the_cells_that_are_filled(monkeypatch):
    """The same for every moment of the past, whatever that shows; by a neighbour's present map, and by the place."""
    said = []

    def watching(*arguments, weights, offsets, **settings):
        said.append(torch.cat([weights, *offsets.unbind(-1)], dim=1))
        return operation(*arguments, weights=weights, offsets=offsets, **settings)

    operation = temporal.multi_depth_warp
    monkeypatch.setattr(temporal, "multi_depth_warp", watching)
    module = with_noise(remembering(topology="neighbours", depths=(5.0, 30.0)))

    def steer(past, features):
        """Those of FRONT, FRONT_LEFT, FRONT_RIGHT, from two moments."""
        said.clear()
        module.reset_history()
        for step, shown in enumerate((past, 2 * past)):
            module(shown, NOBODY, wall_frame(step, SIZE, time=0.5 * step))
        module(features, without(FRONT), wall_frame(2, SIZE, time=1.0))
        assert torch.equal(*said)
        return said[0]

    features = maps(5)
    first = steer(maps(), features)
    assert torch.equal(first, steer(maps(7), features))
    features[0, LEFT] += 1
    changed = steer(maps(), features) != first
    assert not changed[[0, 2]].any() and changed[1].any()
    features[0, FRONT] = 0  # a black image's map is the same in every cell, its place is not
    assert steer(maps(), features)[0].flatten(1).std(dim=1).min() > 1e-3


def test_a_past_in_which_nothing_is_found_is_no_past():
    """FRONT_LEFT looked the other way then; that must be as if it had been missing."""
    module, past = with_noise(remembering(topology="neighbours")), maps()
    then, now = wall_frame(0, SIZE), wall_frame(1, SIZE, time=0.5)
    away = then.image_T_ego.clone()
    away[0, LEFT, :3] *= -1
    looked_away = completed(module, replace(then, image_T_ego=away), past, now)
    torch.testing.assert_close(looked_away, completed(module, then, past, now, gone=[LEFT]))
    assert not torch.allclose(looked_away, completed(module, then, past, now), atol=1e-3)


def test_the_attention_is_told_camera_and_age_of_every_key():
    module, told = remembering(topology="neighbours"), {}
    module.attention.register_forward_pre_hook(
        lambda _, positional, named: told.update(camera=positional[3], **named), with_kwargs=True
    )
    for step, time in enumerate((0.0, 0.2, 0.7)):
        missing = without(LEFT) if step == 1 else NOBODY
        module(maps(), missing, wall_frame(step, SIZE, time=time))
    module(maps(), without(FRONT), wall_frame(3, SIZE, time=1.0))
    assert told["camera"].tolist() == [FRONT, LEFT, RIGHT, FRONT, RIGHT, FRONT, LEFT, RIGHT]  # the newest moment first
    expected = torch.tensor([0.3] * 3 + [0.8] * 2 + [1.0] * 3)
    torch.testing.assert_close(told["key_age"].float(), expected)


def test_age_enters_a_key_as_its_encoding():
    attention = with_noise(CameraAttention(32, 6, heads=2))
    queries, keys, camera = torch.randn(1, 32, *SIZE), torch.randn(2, 32, 2, 6), torch.tensor([3, 4])
    table, age = torch.tensor([[0, 1]]), torch.tensor([0.5, 1.5])
    encoded = attention.encoding(camera, age, (2, 6)) - attention.encoding(camera, torch.zeros(2), (2, 6))
    aged = attention(queries, torch.tensor([0]), keys, camera, table, key_age=age)
    moved = attention(queries, torch.tensor([0]), keys + encoded.mT.unflatten(-1, (2, 6)), camera, table)
    torch.testing.assert_close(aged, moved, atol=1e-5, rtol=1e-5)
    present = attention(queries, torch.tensor([0]), keys, camera, table)
    past = attention(queries, torch.tensor([0]), keys, camera, table, key_age=-age)
    assert min((aged - other).abs().max() for other in (present, past)) > 1e-2
