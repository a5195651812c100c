"""Overlap of turned rectangles and what is kept of them, against shapely."""

import math

import pytest
import torch

from rigfuse.modules.static_bev.rotated import corners, rotated_iou, rotated_nms

shapely = pytest.importorskip("shapely")


def boxes(count, seed):
    torch.manual_seed(seed)
    low = torch.tensor([-4.0, -4.0, 0.3, 0.3, -7.0])
    high = torch.tensor([4.0, 4.0, 6.0, 4.0, 7.0])
    return low + (high - low) * torch.rand(count, 5)


def by_shapely(a, b):
    a, b = (shapely.polygons(corners(each.double()).numpy()) for each in (a, b))
    common = shapely.area(shapely.intersection(a[:, None], b[None]))
    return torch.from_numpy(common / (shapely.area(a)[:, None] + shapely.area(b)[None] - common))


def test_overlap_is_shapelys():
    a, b = boxes(40, 0), boxes(50, 1)
    assert torch.allclose(rotated_iou(a, b), by_shapely(a, b), atol=1e-9)
    far = torch.tensor([1e5, -2e5, 0, 0, 0.0])
    assert torch.allclose(rotated_iou((a + far).double(), (b + far).double()), by_shapely(a + far, b + far), atol=1e-5)


def test_boxes_that_share_edges_or_are_the_same():
    box = torch.tensor([[1.0, 2.0, 4.0, 2.0, 0.3]])
    same = torch.cat([box, box + torch.tensor([0, 0, 0, 0, math.pi])])
    assert torch.allclose(rotated_iou(box, same), torch.ones(1, 2, dtype=torch.float64), atol=1e-9)
    square = torch.tensor([[0.0, 0, 2, 2, 0]])
    others = torch.tensor([[2.0, 0, 2, 2, 0], [1.0, 0, 2, 2, 0], [0.0, 0, 1, 1, 0], [0.0, 0, 2, 2, math.pi / 4]])
    expected = torch.tensor([[0, 1 / 3, 1 / 4, 1 / math.sqrt(2)]], dtype=torch.float64)
    assert torch.allclose(rotated_iou(square, others), expected, atol=1e-6)
    assert rotated_iou(square, others[:0]).shape == (1, 0)
    assert rotated_iou(torch.zeros(1, 5), torch.zeros(1, 5)).item() == 0  # nothing has no overlap


def test_the_best_of_what_overlaps_stays():
    found, scores = boxes(100, 2), torch.rand(100)
    scores[7] = torch.nan
    overlap, kept = by_shapely(found, found), []
    for place in scores.nan_to_num(-1).argsort(descending=True).tolist():
        if place != 7 and not any(overlap[place, other] > 0.2 for other in kept):
            kept.append(place)
    assert rotated_nms(found, scores, 0.2).tolist() == kept and 5 < len(kept) < 90
