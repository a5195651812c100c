"""A drive in the mirror: twice it is itself, and what is true of it is seen where it says."""

from dataclasses import fields, replace

import pytest
import torch

from rigfuse.modules.sparse_drive.motion import COMMANDS
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.data import DrivingSamples, build_driving
from rigfuse.train.systems.sparse_drive.mirror import mirrored, partners


@pytest.fixture(scope="module")
def sets(small_world, tmp_path_factory):
    made = experiment("sparsedrive_small_stage2_tiny")
    made.data.root, made.data.cache = str(small_world), str(tmp_path_factory.mktemp("cache"))
    made.data.image_size = (36, 60)  # of which the maps are padded to 48 × 64
    return build_driving(made.data, made.model, 0)


def _same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9, equal_nan=True)
    if hasattr(a, "__dataclass_fields__"):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def test_the_mirror_of_the_mirror_is_the_drive(sets):
    for batch in (replace(sets[0][0, 0], depth=[]), sets[1][0, 1]):
        names = sets[0].moment(0).rig.names
        once = mirrored(batch, names)
        assert _same(mirrored(once, names), batch) and not _same(once, batch)
        signs = once.truth.boxes[0] / batch.truth.boxes[0]
        assert signs[0].sign().tolist() == [1, -1, 1, 1, 1, 1, -1, 1, -1]
    swapped = {COMMANDS.index("left"): COMMANDS.index("right"), COMMANDS.index("right"): COMMANDS.index("left")}
    for command in range(3):
        batch.truth.command = torch.tensor([command])
        assert mirrored(batch, names).truth.command.item() == swapped.get(command, command)


def test_in_the_mirror_boxes_lie_on_the_same_pixels_of_the_partners(sets):
    """And the way to the moment before is the mirrored way: the pose does not come from another world."""
    batch = replace(sets[0][0, 0], depth=[])
    names = sets[0].moment(0).rig.names
    once, width = mirrored(batch, names), batch.images.shape[-1]
    for camera, partner in enumerate(partners(names)):
        assert names[partner].replace("LEFT", "#").replace("RIGHT", "LEFT").replace("#", "RIGHT") == names[camera]
        assert torch.equal(once.images[0, 0, camera], batch.images[0, 0, partner].flip(-1))
        pixel = [_seen(item, place) for item, place in ((once, camera), (batch, partner))]
        torch.testing.assert_close(pixel[0][:, 1:], pixel[1][:, 1:])
        torch.testing.assert_close(pixel[0][:, 0], (width - 1) - pixel[1][:, 0])
    moved = [torch.linalg.solve(item.frames[1].world_T_ego, item.frames[0].world_T_ego)[0] for item in (batch, once)]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(moved[1], signs[:, None] * moved[0] * signs)
    with pytest.raises(ValueError, match="a mirrored drive needs CAM_LEFT too"):
        partners(("CAM_FRONT", "CAM_RIGHT"))


def _seen(batch, camera):
    """Pixels and depth of the boxes' centres."""
    points = torch.cat([batch.truth.boxes[0][:, :3], torch.ones(len(batch.truth.boxes[0]), 1)], 1).double()
    seen = points @ batch.frames[-1].image_T_ego[0, camera].T
    return torch.cat([seen[:, :2] / seen[:, 2:3], seen[:, 2:3]], dim=1)


def test_half_of_the_training_samples_are_mirrored_with_their_depth(sets):
    """The depth that LiDAR gives agrees with the mirrored one where cells lie mirrored."""
    training = sets[0]
    config = replace(training.config, mirror=True, image_size=(48, 64))
    samples = DrivingSamples(training.drives, config, True, 0, training.model, training.truth)
    plain = DrivingSamples(training.drives, replace(config, mirror=False), True, 0, training.model, training.truth)
    found = set()
    for epoch in range(8):
        item, before = samples[epoch, 0], plain[epoch, 0]
        was = not torch.equal(item.images, before.images)
        found.add(was)
        order = partners(training.moment(0).rig.names) if was else list(range(6))
        expected = before.depth[0][:, order].flip(-1) if was else before.depth[0]
        same = (item.depth[0] - expected).abs() < 1e-4
        assert same.float().mean() > 0.99  # a point on the edge of two cells may fall in either
    assert found == {True, False}
    evaluated = DrivingSamples(training.drives, config, False, 0, training.model, training.truth)
    assert torch.equal(evaluated[0, 1].images, evaluated[3, 1].images)
