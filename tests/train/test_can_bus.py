"""Messages of the CAN bus: the last one that is known at a time, or none; broken files are one line."""

import json

import pytest

from rigfuse.train.data.can_bus import PoseMessages


def message(time, speed):
    return dict(utime=time, vel=[speed, 0, 0], accel=[0, 0, 9.8], rotation_rate=[0, 0, 0.1], pos=[0, 0, 0])


def written(folder, content):
    file = folder / "scene_pose.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_the_last_message_that_is_not_later(tmp_path):
    messages = PoseMessages(written(tmp_path, [message(2_000_000, 2.0), message(1_000_000, 1.0)]))
    assert messages.before(999_999) is None  # nothing is known yet
    assert messages.before(1_000_000).lag == 0
    state = messages.before(1_400_000)
    assert state.velocity.tolist() == [1, 0, 0] and state.lag == pytest.approx(0.4)
    assert state.acceleration.tolist() == [0, 0, 9.8] and state.rotation_rate.tolist() == [0, 0, 0.1]
    assert messages.before(1_600_000) is None  # too long ago
    assert messages.before(2_300_000).velocity[0] == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        "[1]",
        "null",
        "[" * 100_000,
        [{"utime": 1}],
        [message(1, float("nan"))],
        [message(1, "fast")],
        [message("now", 1.0)],
        [message(10**30, 1.0)],
        [message(1, 1.0) | {"vel": [1.0]}],
    ],
    ids=lambda content: str(content)[:20],
)
def test_a_broken_file_is_one_line(tmp_path, content):
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match="scene_pose.json") as caught:
        PoseMessages(file).before(1)
    assert "\n" not in str(caught.value)
