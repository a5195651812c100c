import math

import pytest
import torch
import torch.nn.functional as F

from rigfuse.modules.detection.boxes import Predictions, decode, decode_boxes, encode_boxes


def some_boxes(count, dtype=torch.float64):
    center = (torch.rand(count, 3, dtype=dtype) - 0.5) * 80
    size = torch.rand(count, 3, dtype=dtype) * 10 + 0.1
    yaw = (torch.rand(count, 1, dtype=dtype) - 0.5) * 8 * math.pi
    return torch.cat([center, size, yaw, torch.randn(count, 2, dtype=dtype)], dim=1)


def test_box_code_round_trip_and_yaw_wraps_around():
    boxes = some_boxes(200)
    again = decode_boxes(encode_boxes(boxes))
    others = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(again[:, others], boxes[:, others])
    turns = (again[:, 6] - boxes[:, 6]) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-12)
    assert (turns.round() != 0).any() and (again[:, 6].abs() <= math.pi).all()
    # either side of ±π is the same direction, and so nearly the same code
    around = torch.zeros(2, 9).index_fill(1, torch.tensor([3, 4, 5]), 1.0)
    around[:, 6] = torch.tensor([math.pi - 1e-4, -math.pi + 1e-4])
    assert (encode_boxes(around).diff(dim=0).abs() < 3e-4).all()


def test_box_code_is_what_the_field_says():
    box = torch.tensor([[1.0, 2.0, 3.0, math.e, 1.0, math.e**2, math.pi / 2, -4.0, torch.nan]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 2.0, 3.0, 1.0, 0.0, 2.0, 1.0, 0.0, -4.0, torch.nan]], dtype=torch.float64)
    torch.testing.assert_close(encode_boxes(box), expected, equal_nan=True)
    assert decode_boxes(expected * torch.tensor([1] * 6 + [7, 7, 1, 1]))[0, 6] == pytest.approx(math.pi / 2)


def certain(boxes, labels, score=4.0, classes=10):
    """Predictions of one sample whose last layer holds these boxes; the layer before holds nonsense."""
    logits = torch.where(F.one_hot(labels, classes).bool(), score, -8.0)[None]
    code = encode_boxes(boxes)[None]
    return Predictions(torch.stack([-logits, logits]), torch.stack([code * 0 + 7, code]))


def test_decode_finds_the_boxes_best_first():
    boxes, labels = some_boxes(6, torch.float32), torch.tensor([3, 1, 4, 1, 5, 9])
    boxes[:, 2:3] *= 0.1
    boxes[:, 6] = torch.linspace(-3, 3, 6)
    score = torch.tensor([1.0, 6.0, 2.0, 5.0, 3.0, 4.0])[:, None]
    order = [1, 3, 5, 4, 2, 0]
    (found,) = decode(certain(boxes, labels, score), top=6)
    torch.testing.assert_close(found.boxes, boxes[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, labels[order])
    torch.testing.assert_close(found.scores, score[order, 0].sigmoid())
    (best,) = decode(certain(boxes, labels, score), top=2)
    assert torch.equal(best.boxes, found.boxes[:2]) and best.scores.dtype == torch.float32


def test_decode_drops_what_is_outside_and_what_is_no_number():
    boxes, labels = some_boxes(8, torch.float32), torch.arange(8)
    boxes[:, :3] = 0
    predictions = certain(boxes, labels)
    code, logits = predictions.boxes[-1, 0], predictions.logits[-1, 0]
    code[0, 0], code[1, 1], code[2, 2] = 61.3, -61.3, 10.1
    code[3, 0], code[4, 4], code[5, 8] = torch.nan, 1000.0, torch.inf  # a size of e¹⁰⁰⁰ m
    logits[6] = torch.nan
    code[7, :3] = torch.tensor([61.2, -61.2, 10.0])  # on the border is inside
    (found,) = decode(predictions, top=8)
    assert found.labels.tolist() == [7] and found.boxes.isfinite().all()
    (found,) = decode(predictions, top=1000)
    assert len(found.labels) == 10  # every class of the one query that is left


def test_decode_keeps_the_order_of_equal_and_of_saturated_scores():
    logits = torch.zeros(1, 1, 50, 4)
    boxes = encode_boxes(torch.cat([torch.arange(50.0)[:, None], torch.ones(50, 8)], dim=1))[None, None]
    (found,) = decode(Predictions(logits, boxes), top=10)
    assert found.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert found.boxes[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    logits[0, 0, :, 0] = torch.linspace(30, 300, 50)  # all of score 1.0 in float32
    logits[0, 0, 20, 1] = torch.inf
    (found,) = decode(Predictions(logits, boxes), top=3)
    assert found.boxes[:, 0].tolist() == [20, 49, 48] and found.scores.tolist() == [1, 1, 1]


def test_refusals():
    with pytest.raises(ValueError, match=r"encode_boxes: boxes has shape \(4, 10\), needs \(…, 9\)"):
        encode_boxes(torch.zeros(4, 10))
    with pytest.raises(ValueError, match="decode_boxes: code has shape"):
        decode_boxes(torch.zeros(4, 9))
