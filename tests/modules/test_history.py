"""The history queue: whose past is kept, and that nobody can change it."""

from collections.abc import Sequence

import pytest
import torch

from rigfuse.modules.history import HistoryQueue
from rigfuse.modules.rig import RigFrame

BATCH, VIEWS = 3, 2
EYE = torch.eye(4, dtype=torch.float64)


def frame(times: Sequence[float], scenes: Sequence[str] = ("a", "b", "c")) -> RigFrame:
    batch = len(times)
    return RigFrame(
        EYE.expand(batch, VIEWS, 4, 4), EYE.expand(batch, 4, 4), torch.tensor(times, dtype=torch.float64), tuple(scenes)
    )


def features(value: float = 0.0, batch=BATCH) -> torch.Tensor:
    return torch.full((batch, VIEWS, 4, 2, 3), float(value))


def nothing_missing(batch=BATCH) -> torch.Tensor:
    return torch.zeros(batch, VIEWS, dtype=torch.bool)


def after(*moments, now, length=4, **settings) -> HistoryQueue:
    """A queue that has seen the moments and is prepared for `now`; a moment is (times) or (times, scenes)."""
    queue = HistoryQueue(length, **settings)
    for value, moment in enumerate(moments):
        queue.push(features(value), nothing_missing(), frame(*moment))
    queue.prepare(frame(*now), features())
    return queue


def availability(queue):
    """For each frame, newest first, which samples it is the past of."""
    for past in queue.frames:
        assert (past.available.all(1) == past.available.any(1)).all()
    return [past.available.all(1).tolist() for past in queue.frames]


def test_newest_first_and_no_more_than_length():
    queue = after(*[([t, t, t],) for t in (1.0, 1.5, 2.0, 2.5)], now=([3.0] * 3,), length=3)
    assert [past.features[0, 0, 0, 0, 0].item() for past in queue.frames] == [3, 2, 1]
    assert [past.frame.timestamp[0].item() for past in queue.frames] == [2.5, 2.0, 1.5]
    assert availability(queue) == [[True] * 3] * 3


@pytest.mark.parametrize(
    "now, kept",
    [
        (([1.5, 1.5, 1.5], ("a", "x", "c")), [True, False, True]),  # another scene
        (([3.0, 3.001, 1.5],), [True, False, True]),  # exactly the gap, and beyond it
        (([1.5, 0.9, 1.5],), [True, False, True]),  # backwards
        (([1.5, 1.0, 1.5],), [True, False, True]),  # the same moment again
        (([1.5, float("nan"), 1.5],), [True, False, True]),
    ],
)
def test_a_broken_past_is_cleared_for_its_sample_only(now, kept):
    queue = after(([0.5] * 3,), ([1.0] * 3,), now=now)
    assert availability(queue) == [kept, kept]


def test_a_cleared_sample_starts_again():
    queue = after(([1.0] * 3,), ([1.5] * 3, ("a", "x", "c")), now=([2.0] * 3, ("a", "x", "c")))
    assert availability(queue) == [[True] * 3, [True, False, True]]


def test_pushing_without_prepare_clears_too():
    queue = HistoryQueue(4)
    for times in ([1.0] * 3, [1.5, 9.0, 1.5], [2.0, 9.5, 2.0]):
        queue.push(features(), nothing_missing(), frame(times))
    assert availability(queue) == [[True] * 3, [True] * 3, [True, False, True]]


def test_when_no_past_is_left_no_memory_is_kept():
    assert after(([1.0] * 3,), now=([9.0] * 3,)).frames == []


def test_missing_cameras_are_not_history():
    queue = HistoryQueue(2)
    missing = torch.tensor([[True, False], [False, False], [True, True]])
    queue.push(features(), missing, frame([1.0] * 3))
    missing.fill_(False)
    assert queue.frames[0].available.tolist() == [[False, True], [True, True], [False, False]]


@pytest.mark.parametrize("shape", [(2, VIEWS, 4, 2, 3), (3, VIEWS, 4, 2, 5)])
def test_another_batch_or_map_size_clears_everything(shape):
    queue = HistoryQueue(2)
    queue.push(features(), nothing_missing(), frame([1.0] * 3))
    queue.prepare(frame([1.5] * shape[0], "abc"[: shape[0]]), torch.zeros(shape))
    assert queue.frames == []


def test_another_device_clears_everything():
    queue = HistoryQueue(2)
    queue.push(features(), nothing_missing(), frame([1.0] * 3))
    queue.prepare(frame([1.5] * 3), features().to("meta"))
    assert queue.frames == []


def test_what_the_caller_does_later_changes_nothing():
    queue = HistoryQueue(2)
    maps, now = features(1), frame([1.0] * 3).clone()
    queue.push(maps, nothing_missing(), now)
    maps.fill_(7)
    now.world_T_ego.zero_()
    now.timestamp.zero_()
    stored = queue.frames[0]
    assert (stored.features == 1).all() and torch.equal(stored.frame.world_T_ego[0], EYE)
    assert stored.frame.timestamp.tolist() == [1.0] * 3


def test_what_autograd_saved_survives_later_moments():
    queue = HistoryQueue(1)
    queue.push(features(2), nothing_missing(), frame([1.0] * 3))
    weight = torch.ones((), requires_grad=True)
    loss = (queue.frames[0].features * weight).sum()
    for time in (1.5, 9.0, 9.5):
        queue.push(features(5), nothing_missing(), frame([time, 1.5, 9.5]))
    loss.backward()
    assert weight.grad == 2 * features().numel()


def test_stored_without_gradient_and_in_the_asked_for_dtype():
    queue = HistoryQueue(1, dtype=torch.bfloat16)
    channels_last = torch.randn(BATCH, VIEWS, 2, 3, 4, requires_grad=True).movedim(-1, 2)
    queue.push(channels_last, nothing_missing(), frame([1.0] * 3))
    stored = queue.frames[0].features
    assert stored.dtype == torch.bfloat16 and not stored.requires_grad
    assert stored.stride() == channels_last.stride()
    assert torch.equal(stored, channels_last.detach().bfloat16())


def test_a_slice_does_not_keep_the_whole_alive():
    queue = HistoryQueue(1)
    wide = torch.zeros(BATCH, VIEWS, 8, 2, 3)
    queue.push(wide[:, :, :4], nothing_missing(), frame([1.0] * 3))
    stored = queue.frames[0].features
    assert stored.untyped_storage().nbytes() == stored.numel() * 4


def test_bad_input_says_what_is_needed():
    queue = HistoryQueue(1)
    with pytest.raises(ValueError, match="length is 0"):
        HistoryQueue(0)
    with pytest.raises(ValueError, match="max_gap is 0"):
        HistoryQueue(1, max_gap=0)
    with pytest.raises(ValueError, match=r"needs \(B, V, C, H, W\)"):
        queue.push(features()[0], nothing_missing(), frame([1.0] * 3))
    with pytest.raises(TypeError, match="missing is int64, needs bool"):
        queue.push(features(), nothing_missing().long(), frame([1.0] * 3))
    with pytest.raises(ValueError, match=r"frame has \(batch, cameras\) \(2, 2\), needs \(3, 2\)"):
        queue.push(features(), nothing_missing(), frame([1.0] * 2, "ab"))
