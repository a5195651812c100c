import itertools
import math

import pytest
import torch

from rigfuse.modules.detection.boxes import encode_boxes
from rigfuse.modules.detection.denoising import BACKGROUND, make_denoising

RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)


def boxes_of(*counts):
    """For each sample a (count, 9) and a (count,)."""
    boxes = [torch.randn(count, 9) * torch.tensor([10, 10, 0.5, 0, 0, 0, 2, 5, 5]) for count in counts]
    for box in boxes:
        box[:, 3:6] = torch.rand(len(box), 3) * 4 + 0.5
    return boxes, [torch.randint(10, (count,)) for count in counts]


def in_metres(reference):
    low, high = torch.tensor(RANGE).split(3)
    return low + (high - low) * reference


def test_mask_lets_nobody_see_the_answer():
    """Every pair of queries, against the rule in words."""
    made = make_denoising(*boxes_of(2, 3), queries=7, point_range=RANGE, groups=2)
    who = [("dn", g) for g in range(2) for _ in range(3)] + [("matching", None)] * 7
    assert made.mask.shape == (13, 13) and made.mask.dtype == torch.bool
    for (i, a), (j, b) in itertools.product(enumerate(who), repeat=2):
        allowed = b[0] == "matching" or a == b
        assert made.mask[i, j].item() == allowed, (i, a, j, b)


def test_queries_are_the_boxes_group_by_group():
    boxes, labels = boxes_of(2, 0, 5)
    made = make_denoising(boxes, labels, 100, RANGE, groups=3, noise_scale=0.0, split=2.0)
    assert made.reference.shape == (3, 15, 3) and made.mask.shape == (115, 115)
    for sample, group, i in itertools.product(range(3), range(3), range(5)):
        query = group * 5 + i
        assert made.valid[sample, query].item() == (i < len(boxes[sample]))
        if i < len(boxes[sample]):
            torch.testing.assert_close(in_metres(made.reference)[sample, query], boxes[sample][i, :3])
            assert torch.equal(made.boxes[sample, query], boxes[sample][i])
            assert made.labels[sample, query] == labels[sample][i]
        else:
            assert made.labels[sample, query] == BACKGROUND and not made.reference[sample, query].any()


def test_noise_stays_in_the_box_and_decides_the_label():
    boxes, labels = boxes_of(50)
    boxes[0][:, 2] = 1.0
    boxes[0][:, 3:6] = torch.tensor([4.0, 1.0, 1.5])
    made = make_denoising(boxes, labels, 5000, RANGE, groups=100)
    # into the box's own frame by a complex rotation
    off = in_metres(made.reference)[0] - made.boxes[0, :, :3]
    turned = torch.complex(off[:, 0], off[:, 1]) * torch.exp(-1j * made.boxes[0, :, 6])
    noise = torch.stack([turned.real, turned.imag, off[:, 2]], dim=1) / (made.boxes[0, :, 3:6] / 2)
    assert noise.abs().max() <= 1.001
    for axis in noise.T:
        assert axis.mean().abs() < 0.05 and axis.std().item() == pytest.approx(3**-0.5, rel=0.05)
    length = noise.norm(dim=1)
    clear = (length - 0.75).abs() > 1e-3
    assert torch.equal((made.labels[0] == BACKGROUND)[clear], (length > 0.75)[clear])
    kept = made.labels[0] != BACKGROUND
    assert torch.equal(made.labels[0][kept], labels[0].repeat(100)[kept])
    assert kept.float().mean().item() == pytest.approx(math.pi / 6 * 0.75**3, rel=0.1)  # a ball in a cube


def test_noise_comes_from_the_global_generator():
    boxes, labels = boxes_of(3)
    first = make_denoising(boxes, labels, 30, RANGE)
    torch.manual_seed(1)
    second = make_denoising(boxes, labels, 30, RANGE)
    torch.manual_seed(1)
    third = make_denoising(boxes, labels, 30, RANGE)
    assert torch.equal(second.reference, third.reference) and torch.equal(second.labels, third.labels)
    assert not torch.equal(first.reference, second.reference)


@pytest.mark.parametrize(("most", "queries", "groups"), [(3, 100, 10), (3, 8, 2), (8, 8, 1), (9, 8, 0), (3, 0, 0)])
def test_as_many_groups_as_there_is_room_for(most, queries, groups):
    made = make_denoising(*boxes_of(1, most), queries=queries, point_range=RANGE)
    assert made.reference.shape == (2, groups * most, 3) and len(made.mask) == groups * most + queries


def test_no_boxes_at_all():
    made = make_denoising(*boxes_of(0, 0), queries=4, point_range=RANGE)
    assert made.reference.shape == (2, 0, 3) and made.boxes.shape == (2, 0, 9)
    assert made.labels.shape == made.valid.shape == (2, 0)
    assert made.mask.shape == (4, 4) and made.mask.all()


def test_hostile_boxes_count_as_padding():
    boxes, labels = boxes_of(8)
    boxes[0][0, 0], boxes[0][1, 6], boxes[0][2, 3] = torch.nan, torch.inf, torch.nan
    boxes[0][3, 4], boxes[0][4, 5] = 0.0, -1.0
    boxes[0][5, 7:] = torch.nan  # an unknown velocity is no fault
    boxes[0][6, 0] = 1e30  # far outside the range
    made = make_denoising(boxes, labels, 8, RANGE)
    assert made.valid.tolist() == [[False] * 5 + [True] * 3]
    assert made.reference.isfinite().all() and made.reference.min() >= 0 and made.reference.max() <= 1
    assert (made.labels[0, :5] == BACKGROUND).all() and made.boxes[0, 5, 7:].isnan().all()
    assert encode_boxes(made.boxes)[..., :8].isfinite().all()


def test_nothing_gets_gradients():
    boxes, labels = boxes_of(2)
    made = make_denoising([boxes[0].requires_grad_()], labels, 20, RANGE)
    assert not made.reference.requires_grad and not made.boxes.requires_grad


def test_refusals():
    boxes, labels = boxes_of(2, 1)
    with pytest.raises(ValueError, match="make_denoising: boxes are of 2 samples and labels of 1, needs"):
        make_denoising(boxes, labels[:1], 9, RANGE)
    with pytest.raises(ValueError, match="at least 1"):
        make_denoising([], [], 9, RANGE)
    with pytest.raises(ValueError, match=r"make_denoising: labels\[1\] has shape \(2,\), needs \(G\) = \(1\)"):
        make_denoising(boxes, [labels[0], labels[0]], 9, RANGE)
    with pytest.raises(TypeError, match=r"make_denoising: labels\[0\] is int32, needs int64"):
        make_denoising(boxes, [label.int() for label in labels], 9, RANGE)
    with pytest.raises(ValueError, match="groups is -1"):
        make_denoising(boxes, labels, 9, RANGE, groups=-1)
    with pytest.raises(ValueError, match="make_denoising: point_range is"):
        make_denoising(boxes, labels, 9, RANGE[:5])
