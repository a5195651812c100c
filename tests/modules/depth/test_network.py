"""The depth network: what its bins mean, what counts, and that its loss says what it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from rigfuse.modules.backbones import PyramidConfig
from rigfuse.modules.depth.network import DepthConfig, DepthInput
from rigfuse.train.config import check

STRIDES = (8, 16)


def network(**settings):
    backbone = PyramidConfig(resnet="tiny", frozen_stages=-1, norm_eval=False, strides=STRIDES)
    settings = dict(channels=16, bins=8, nearest=2.0, farthest=32.0) | settings
    return DepthConfig(backbone=backbone, **settings).build().eval()


def batch(depth=5.0, label=None):
    images, shapes = torch.randn(2, 3, 3, 32, 64), [(2, 3, 32 // s, 64 // s) for s in STRIDES]
    labels = [] if label is None else [torch.full(shape, label) for shape in shapes]
    return DepthInput(images, [torch.full(shape, depth) for shape in shapes], labels)


def certain(model, index):
    """The network says one bin everywhere."""
    with torch.no_grad():
        for head in model.heads:
            head.weight.zero_()
            head.bias.copy_(100.0 * F.one_hot(torch.tensor(index), model.bins))
    return model


@pytest.mark.parametrize("index", [0, 3, 7])
def test_bins_have_equal_width_in_the_logarithm(index):
    """Eight of them from 2 to 32 metres: half an octave each."""
    output = certain(network(), index)(batch())
    centre = 2.0 * 2 ** ((index + 0.5) / 2)
    for depth, stride in zip(output.depths, STRIDES):
        assert depth.shape == (2, 3, 32 // stride, 64 // stride)
        torch.testing.assert_close(depth, torch.full_like(depth, centre), rtol=1e-4, atol=0)


def test_the_loss_is_small_where_the_bin_is_right_alone():
    model = certain(network(), 3)
    low, high = 2.0 * 2**1.5, 2.0 * 2**2
    for depth, right in [(low * 1.01, True), (high * 0.99, True), (low * 0.99, False), (high * 1.01, False)]:
        assert (model(batch(depth)).losses["depth"] < 1e-3) == right, depth


def test_what_is_unknown_or_out_of_range_does_not_count():
    model, some = network(), batch()
    expected = model(some).losses["depth"]
    for level in some.depths:
        level[0, 0, 0, :2] = torch.tensor([0.0, 40.0])  # no point, and too far
    changed = model(some).losses["depth"]
    assert changed != expected
    for level in some.depths:
        level[0, 0, 0, :2] = torch.tensor([1.9, math.nan])
    assert model(some).losses["depth"] == changed
    nothing = model.train()(batch(0.0)).losses["depth"]
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_every_part_learns():
    model = network().train()
    model(batch()).losses["depth"].backward()
    idle = {n for n, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert all("stages.3" in name for name in idle)  # whose maps no scale here needs


def test_cells_of_objects_count_ten_times_those_without_and_unknown_ones_do_not():
    model = network(classes=("car", "cone")).train()
    for head in model.object_heads:
        head.weight.data.zero_()
        head.bias.data.copy_(torch.tensor([2.0, 0.0, 1.0]))  # no object, car, cone
    cost = -torch.tensor([2.0, 0.0, 1.0]).log_softmax(0)
    some = batch(label=-2)
    assert model(some).losses["objects"] == 0
    for level in some.labels:
        level[0, 0, 0, :3] = torch.tensor([-1, 0, 0])
        level[1, 2, -1, -1] = 1
    output = model(some)
    torch.testing.assert_close(output.losses["objects"], (0.1 * cost[0] + 2 * cost[1] + cost[2]) / 3.1)
    assert all((level == -1).all() and level.shape == true.shape for level, true in zip(output.labels, some.labels))
    sum(output.losses.values()).backward()
    assert all(head.bias.grad.any() for head in (*model.heads, *model.object_heads))
    assert "objects" not in network()(batch()).losses


def test_a_range_that_is_empty_is_refused():
    with pytest.raises(ValueError, match="nearest is 9.0 and farthest is 9.0, needs nearest < farthest"):
        check(DepthConfig(nearest=9.0, farthest=9.0))
