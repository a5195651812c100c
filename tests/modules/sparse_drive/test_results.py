"""What is read from the head's outputs."""

import torch

from rigfuse.modules.sparse_drive.decoder import InstanceOutput
from rigfuse.modules.sparse_drive.head import DriveOutput, HeadConfig
from rigfuse.modules.sparse_drive.results import ResultConfig, read_results


def output(boxes):
    """One sample: (x, y, label, logit) of each box, as sure of its centre as all others are."""
    count = len(boxes)
    anchors, logits = torch.zeros(1, 1, count, 11), torch.full((1, 1, count, 10), -9.0)
    for place, (x, y, label, logit) in enumerate(boxes):
        anchors[0, 0, place, :2] = torch.tensor([x, y])
        logits[0, 0, place, label] = logit
    feature, ids = torch.zeros(1, count, 8), torch.arange(count)[None]
    detection = InstanceOutput(logits, anchors, torch.zeros(1, 1, count, 2), feature, feature, ids)
    lines = InstanceOutput(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 8), None, feature, feature, ids)
    return DriveOutput(detection, lines, None)


def kept(boxes, apart):
    (result,) = read_results(output(boxes), None, HeadConfig(), ResultConfig(apart=apart))
    assert len(result.boxes) == len(result.scores) == len(result.class_scores) == len(result.labels) == len(result.ids)
    assert torch.equal(result.boxes[:, 0], torch.tensor([float(boxes[place][0]) for place in result.ids.tolist()]))
    return result.ids.tolist()


def test_of_boxes_of_a_class_that_are_near_the_surest_is_kept():
    boxes = [(0, 0, 0, 1.0), (1.9, 0, 0, 3.0), (3.7, 0, 0, 2.0), (5.6, 0, 0, 0.0), (1.8, 0, 1, -1.0)]
    assert kept(boxes, 0.0) == [1, 2, 0, 3, 4]
    # 2 and 0 are near the surest; 3 is near 2 alone, which is gone; 4 is of another class.
    assert kept(boxes, 2.0) == [1, 3, 4]
    assert kept(boxes, 1.7) == [1, 2, 0, 3, 4]
    assert kept(boxes[:1], 2.0) == [0]
