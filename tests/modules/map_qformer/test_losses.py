"""Losses of the map decoder: what they must not depend on."""

import torch

from rigfuse.modules.map_qformer.decoder import MapOutput
from rigfuse.modules.map_qformer.losses import MapTruth, map_losses
from rigfuse.modules.polylines import line_orders

RANGE = (60.0, 30.0)


def truth(*lines, labels=None):
    labels = torch.arange(len(lines)) % 3 if labels is None else labels
    orders = torch.stack([line_orders(line) for line in lines]) if lines else torch.empty(0, 8, 5, 2)
    return MapTruth([orders], [labels])


def lines():
    """An open line and a closed one, of five points."""
    ring = torch.tensor([[0.0, 0], [6, 0], [6, 3], [0, 3], [0, 0]])
    return torch.stack([torch.linspace(-20, 20, 5), torch.tensor([1.0, 2, 2, 3, 5])], dim=1), ring


def output(points, rounds=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rounds, 1, points.shape[0], 3, generator=generator) - 3
    noise = 0.3 * torch.randn(rounds, 1, *points.shape, generator=generator)
    return MapOutput(logits.requires_grad_(), (points + noise).requires_grad_())


def test_the_order_of_a_lines_points_and_of_the_lines_does_not_matter():
    open_line, ring = lines()
    found = output(torch.cat([torch.stack(lines()), 10 * torch.ones(2, 5, 2)]))
    first = map_losses(found, truth(open_line, ring), RANGE)
    turned = torch.cat([ring[:-1].roll(2, 0), ring[:-1].roll(2, 0)[:1]]).flip(0)
    other = map_losses(found, truth(turned, open_line.flip(0), labels=torch.tensor([1, 0])), RANGE)
    for name in first.total:
        torch.testing.assert_close(first.total[name], other.total[name])
    assert all(first.total[name] > 0 for name in first.total)
    assert first.matches[1][0].instance.tolist() == [0, 1]


def test_a_perfect_answer_costs_nothing():
    """In whichever order of its points."""
    points = torch.stack([lines()[0].flip(0), lines()[1], torch.zeros(5, 2)])
    logits = torch.full((1, 1, 3, 3), -30.0)
    logits[0, 0, 0, 0] = logits[0, 0, 1, 1] = 30
    losses = map_losses(MapOutput(logits, points[None, None]), truth(*lines()), RANGE).total
    assert all(value < 1e-6 for value in losses.values())


def test_points_and_directions_by_hand():
    """One line, moved by 3 m along one axis, then turned by a right angle."""
    line = torch.stack([torch.linspace(0, 8, 5), torch.zeros(5)], dim=1)
    moved, turned = line + torch.tensor([0.0, 3.0]), line.flip(1)
    for points, expected in ((moved, (0.1, 0.0)), (turned, (4 / 60 + 4 / 30, 1.0))):
        found = MapOutput(torch.zeros(1, 1, 1, 3), points[None, None, None])
        losses = map_losses(found, truth(line), RANGE).total
        torch.testing.assert_close(torch.stack([losses["points"], losses["direction"]]), torch.tensor(expected))


def test_without_truth_everything_is_background_and_the_graph_is_whole():
    found = output(torch.zeros(3, 5, 2))
    losses = map_losses(found, truth(), RANGE).total
    sum(losses.values()).backward()
    assert losses["points"] == 0 and found.logits.grad.abs().sum() > 0 and found.points.grad.abs().sum() == 0
