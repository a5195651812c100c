"""Pictures of driving: where corners are, what is drawn, and a film with a picture for each moment."""

import pytest
import torch
from PIL import Image

from rigfuse.train.data.images import as_picture, normalised
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.baselines import results_of_truth
from rigfuse.train.systems.sparse_drive.evaluate import Seen
from rigfuse.train.systems.sparse_drive.pictures import Threshold, box_corners, draw_moment, draw_scene


@pytest.fixture(scope="module")
def seen(small_world, tmp_path_factory):
    settings = experiment("sparsedrive_small_stage2_tiny")
    settings.data.root, settings.data.cache = str(small_world), str(tmp_path_factory.mktemp("cache"))
    settings.data.image_size = (36, 64)
    _, validation = settings.build_data()
    both = [settings.collate([validation[0, index]]).to("cpu") for index in (0, 1)]
    return [Seen(batch, 0, results_of_truth(batch.truth, 0), None) for batch in both], settings.model.head


def test_corners_of_a_box():
    corners = box_corners(torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 1.0, torch.pi / 2]))
    expected = torch.tensor([[0.0, 4.0], [0.0, 0.0], [2.0, 0.0], [2.0, 4.0]])
    torch.testing.assert_close(corners[:4, :2], expected, atol=1e-5, rtol=0)
    assert corners[:4, 2].tolist() == [2.5] * 4 and corners[4:, 2].tolist() == [3.5] * 4


def test_pictures_are_the_bytes_again():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert torch.equal(as_picture(normalised(images)), images)


def test_who_sees_the_truth_is_drawn_as_the_truth(seen, tmp_path):
    (moment, other), head = seen
    axes = draw_moment(moment, head).axes
    assert len(axes) == 14
    for found, true in zip(axes[:7], axes[7:]):
        lines = [[line.get_xydata().tolist() for line in side.lines] for side in (found, true)]
        assert str(lines[0]) == str(lines[1])
    assert sum(len(side.lines) for side in axes[:6]) > 10 and len(axes[6].lines) > 20
    strict = draw_moment(moment, head, Threshold(boxes=0.95, lines=0.95)).axes
    assert len(strict[6].lines) == 2 < len(axes[6].lines)  # the vehicle and its plan
    draw_scene([moment, other], head, tmp_path / "scene.gif", Threshold(boxes=0.95))
    with Image.open(tmp_path / "scene.gif") as film:
        assert film.n_frames == 2 and film.size == (960, 480)
    with pytest.raises(ValueError, match="there are no moments"):
        draw_scene([], head, tmp_path / "none.gif")
