"""Dense supervision of a BEV map, against a cell-by-cell formulation."""

import math

import pytest
import torch

from rigfuse.modules.detection.dense import DenseHead
from rigfuse.modules.maps_layout import MapLayout

LAYOUT = MapLayout((6, 8), (2, 3), point_range=(-8.0, -6.0, -3.0, 8.0, 6.0, 5.0))  # cells of 2 m
NAN = math.nan


def box(x, y, length=4.0, width=2.0, yaw=0.3):
    return [x, y, 0.5, length, width, 1.5, yaw, 1.0, 0.0]


BOXES = [
    torch.tensor([box(-6.9, -5.1), box(3.2, 1.4, 24.0, 20.0), box(3.4, 1.2), box(9.0, 0.0), box(0.0, NAN)]).double(),
    torch.empty(0, 9, dtype=torch.float64),
]
LABELS = [torch.tensor([0, 3, 3, 1, 2]), torch.empty(0, dtype=torch.int64)]
ALL = torch.ones(2, dtype=torch.bool)


def head(seed=0):
    torch.manual_seed(seed)
    module = DenseHead(5, LAYOUT).double()
    torch.nn.init.zeros_(module.heat.bias)  # so that every cell counts
    return module, torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)


def expected(module, bev):
    """Every cell, class and box on its own."""
    logits, said = module.heat(bev), module.boxes(bev)
    classification, regression, centres = 0.0, 0.0, 0
    for sample, (boxes, labels) in enumerate(zip(BOXES, LABELS)):
        there = [
            (b, k, ((b[0] + 8) / 2 - 0.5).item(), ((b[1] + 6) / 2 - 0.5).item())
            for b, k in zip(boxes, labels.tolist())
            if b.isfinite().all() and abs(b[0]) < 8 and abs(b[1]) < 6
        ]
        for b, _, u, v in there:
            centres += 1
            own = said[sample, :, round(v), round(u)]
            truth = [u - round(u), v - round(v), b[2], b[3].log(), b[4].log(), b[5].log(), b[6].sin(), b[6].cos()]
            regression = regression + sum(abs(a - t) for a, t in zip(own, truth))
        for k in range(10):
            for v in range(6):
                for u in range(8):
                    bells = [0.0]
                    for b, label, cu, cv in there:
                        sigma = max(min(b[3], b[4]).item() / 2 / 6, 0.8)
                        away = abs(u - round(cu)), abs(v - round(cv))
                        if label == k and max(away) <= int(3 * sigma):
                            bells.append(math.exp(-(away[0] ** 2 + away[1] ** 2) / (2 * sigma**2)))
                    p, target = logits[sample, k, v, u].sigmoid(), max(bells)
                    if target == 1:
                        classification = classification - (1 - p) ** 2 * p.log()
                    else:
                        classification = classification - (1 - target) ** 4 * p**2 * (1 - p).log()
    peaks = 2  # two of the three boxes on the map share a cell and a class
    return classification / peaks, regression / centres


def test_the_losses_are_those_of_every_cell():
    module, bev = head()
    losses = module.losses(bev, BOXES, LABELS, ALL)
    want = expected(module, bev)
    torch.testing.assert_close(losses["dense_cls"], want[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["dense_box"], want[1].float(), rtol=1e-5, atol=1e-6)
    own = torch.autograd.grad(sum(losses.values()), bev, retain_graph=True)[0]
    torch.testing.assert_close(own, torch.autograd.grad(sum(want), bev)[0], rtol=1e-4, atol=1e-5)


def test_a_sample_that_is_not_known_does_not_count():
    module, bev = head()
    losses = module.losses(bev, BOXES[::-1], LABELS[::-1], torch.tensor([True, False]))
    alone = module.losses(bev[:1], BOXES[1:], LABELS[1:], ALL[:1])
    assert losses == alone and losses["dense_box"] == 0 and losses["dense_cls"] > 0


def test_nothing_to_find_asks_for_nothing_to_be_found():
    module, bev = head()
    nothing = [BOXES[1], BOXES[1]], [LABELS[1], LABELS[1]]
    losses = module.losses(bev, *nothing, ALL)
    assert losses["dense_box"] == 0 and losses["dense_cls"] > 0
    sum(losses.values()).backward()
    with torch.no_grad():
        assert module.losses(bev - 0.1 * bev.grad, *nothing, ALL)["dense_cls"] < losses["dense_cls"]


def test_a_wrong_shape_is_refused():
    module, bev = head()
    with pytest.raises(ValueError, match=r"DenseHead.losses: boxes\[0\]"):
        module.losses(bev, [BOXES[0][:, :7], BOXES[1]], LABELS, ALL)
