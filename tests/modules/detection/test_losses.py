import itertools
import math

import pytest
import torch

from rigfuse.modules.cmt_aqr.head import TaskHeads
from rigfuse.modules.detection.boxes import Predictions, encode_boxes
from rigfuse.modules.detection.denoising import make_denoising
from rigfuse.modules.detection.losses import detection_losses, focal_loss, match

RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)
WEIGHTS = (2, 2, 1, 1, 1, 1, 1, 1, 0.2, 0.2)
CLASSES = 4


def truth(*counts):
    """For each sample boxes (count, 9), every third of unknown velocity, and labels (count,)."""
    boxes = [torch.randn(count, 9) * torch.tensor([10, 10, 0.5, 0, 0, 0, 2, 5, 5]) for count in counts]
    for box in boxes:
        box[:, 3:6] = torch.rand(len(box), 3) * 4 + 0.5
        box[::3, 7:] = torch.nan
    return boxes, [torch.randint(CLASSES, (count,)) for count in counts]


def random_predictions(batch, queries, layers=2, **like):
    logits = torch.randn(layers, batch, queries, CLASSES, **like) * 2
    boxes = torch.randn(layers, batch, queries, 10, **like) * torch.tensor([10, 10] + [1] * 8)
    return Predictions(logits.requires_grad_(), boxes.requires_grad_())


def focal(logit, target):
    """The paper's formula, one float64 number at a time."""
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)


def box_error(code, box):
    target = encode_boxes(box.double()).tolist()
    return sum(w * abs(a - b) for w, a, b in zip(WEIGHTS, code.tolist(), target) if not math.isnan(b))


def cost(logits, code, box, label):
    logit = logits[label].item()
    still = torch.cat([box[:7], box.new_full((2,), torch.nan)])  # the velocity is no part of the cost
    return 2 * (focal(logit, True) - focal(logit, False)) + 0.25 * box_error(code, still)


def test_focal_loss_is_the_formula():
    logits = torch.linspace(-12, 12, 49)
    for target in (True, False):
        expected = [focal(logit, target) for logit in logits.tolist()]
        actual = focal_loss(logits, torch.tensor(target)).tolist()
        assert actual == pytest.approx(expected, rel=1e-5, abs=0)


def test_focal_loss_of_extreme_logits():
    logits = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(loss, torch.tensor([0.25e30, 0.0, 0.0, 0.75e30]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.25, 0.0, 0.0, 0.75]))


@pytest.mark.parametrize(("queries", "count"), [(5, 3), (4, 4), (3, 5), (6, 1)])
def test_match_is_the_best_of_all_assignments(queries, count):
    predictions = random_predictions(1, queries, layers=1)
    logits, code = predictions.logits[0, 0].detach(), predictions.boxes[0, 0].detach()
    boxes, labels = truth(count)
    query, gt = match(logits, code, boxes[0], labels[0])
    costs = [[cost(logits[q], code[q], boxes[0][g], labels[0][g]) for g in range(count)] for q in range(queries)]
    if queries >= count:
        every = [list(zip(chosen, range(count))) for chosen in itertools.permutations(range(queries), count)]
    else:
        every = [list(zip(range(queries), chosen)) for chosen in itertools.permutations(range(count), queries)]
    best = min(every, key=lambda pairs: sum(costs[q][g] for q, g in pairs))
    assert list(zip(query.tolist(), gt.tolist())) == sorted(best)
    assert query.dtype == gt.dtype == torch.int64


@pytest.mark.parametrize("velocity", [torch.nan, 0.0])
def test_velocity_is_no_part_of_the_cost(velocity):
    boxes, labels = truth(1)
    code = encode_boxes(boxes[0].nan_to_num()).repeat(2, 1)
    code[0, 8:] = 1000.0  # wild
    code[1, 0] += 0.1
    boxes[0][0, 7:] = velocity
    assert match(torch.zeros(2, CLASSES), code, boxes[0], labels[0])[0].tolist() == [0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_costs_that_are_not_finite_lose(bad):
    boxes, labels = truth(3)
    predictions = random_predictions(1, 6, layers=1)
    logits, code = predictions.logits[0, 0].detach(), predictions.boxes[0, 0].detach()
    code[:3] = encode_boxes(boxes[0]).nan_to_num()  # these three would win
    code[0, 0], code[2, 4] = bad, bad
    logits[1] = torch.nan
    logits[3:] = torch.tensor([[-1e30], [0], [0]])  # the worst finite one is still better
    query, gt = match(logits, code, boxes[0], labels[0])
    assert query.tolist() == [3, 4, 5] and sorted(gt.tolist()) == [0, 1, 2]
    code[3, 0] = bad  # now one box has to go without
    assert match(logits, code, boxes[0], labels[0])[0].tolist() == [4, 5]
    boxes[0][1, 3] = 0.0  # a box without volume
    boxes[0][2, 2] = bad
    assert match(logits, code, boxes[0], labels[0])[1].tolist() == [0]


@pytest.mark.parametrize(("queries", "count"), [(0, 3), (3, 0), (0, 0)])
def test_match_of_nothing(queries, count):
    boxes, labels = truth(count)
    query, gt = match(torch.zeros(queries, CLASSES), torch.zeros(queries, 10), boxes[0], labels[0])
    assert query.shape == gt.shape == (0,) and query.dtype == torch.int64


def test_losses_are_the_formula():
    """Loops over single numbers in float64, for layers, samples, queries, classes and code."""
    boxes, labels = truth(3, 2)
    made = make_denoising(boxes, labels, 6, RANGE, groups=2)
    padding = made.reference.shape[1]
    assert padding == 6 and not made.valid.all()
    predictions = random_predictions(2, padding + 6)
    losses = detection_losses(predictions, boxes, labels, made)

    expected = dict.fromkeys(("cls", "box", "dn_cls", "dn_box"), 0.0)
    kept = 10 * math.pi / 6 * 0.75**3  # of ten noisy boxes, those that may be expected to keep their class
    for layer, b in itertools.product(range(2), range(2)):
        logits, code = predictions.logits[layer, b].double(), predictions.boxes[layer, b].double()
        query, gt = match(logits[padding:], code[padding:], boxes[b].double(), labels[b])
        matched = dict(zip(query.tolist(), gt.tolist()))
        assert len(matched) == len(boxes[b])
        for q, c in itertools.product(range(6), range(CLASSES)):
            target = q in matched and labels[b][matched[q]] == c
            expected["cls"] += focal(logits[padding + q, c].item(), target) / (5 + 0.1 * (12 - 5))
        expected["box"] += sum(box_error(code[padding + q], boxes[b][g]) for q, g in matched.items()) / 5
        for p in range(padding):
            box = p % 3
            if box < len(boxes[b]):
                target = made.labels[b, p].item()
                found = [focal(logits[p, c].item(), c == target) for c in range(CLASSES)]
                expected["dn_cls"] += sum(found) / kept
                expected["dn_box"] += box_error(code[p], boxes[b][box]) / 10
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)


def perfect(boxes, labels, queries):
    """Predictions, of float64, whose queries say the boxes in reverse and then nothing."""
    logits = torch.full((2, len(boxes), queries, CLASSES), -30.0, dtype=torch.float64)
    code = torch.zeros(2, len(boxes), queries, 10, dtype=torch.float64)
    for b, (box, label) in enumerate(zip(boxes, labels)):
        logits[:, b, range(len(label)), label.flip(0)] = 30.0
        code[:, b, : len(box)] = encode_boxes(box.double()).flip(0).nan_to_num()
    return Predictions(logits, code)


def test_a_perfect_prediction_is_matched_to_itself_and_costs_nothing():
    boxes, labels = truth(4, 7)
    boxes = [box.double() for box in boxes]
    predictions = perfect(boxes, labels, 9)
    for b in range(2):
        query, gt = match(predictions.logits[0, b], predictions.boxes[0, b], boxes[b], labels[b])
        assert gt[query.argsort()].tolist() == list(range(len(boxes[b])))[::-1]
    losses = detection_losses(predictions, boxes, labels)
    assert losses["box"] == 0 and 0 < losses["cls"] < 1e-20
    predictions.boxes[:, 0, 0, 0] += 0.5  # x of one box in each of two layers: 2 layers · weight 2 · 0.5 m / 11 boxes
    assert detection_losses(predictions, boxes, labels)["box"].item() == pytest.approx(2 / 11)


def test_order_of_the_ground_truth_does_not_matter():
    boxes, labels = truth(5, 3)
    predictions = random_predictions(2, 8)
    first = detection_losses(predictions, boxes, labels)
    order = torch.tensor([3, 0, 4, 2, 1])
    again = detection_losses(predictions, [boxes[0][order], boxes[1]], [labels[0][order], labels[1]])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_unknown_velocities_get_no_gradient_and_spread_no_nan():
    boxes, labels = truth(6)
    boxes[0][:, 7:] = torch.nan
    made = make_denoising(boxes, labels, 12, RANGE)
    predictions = random_predictions(1, 12 + 12)
    losses = detection_losses(predictions, boxes, labels, made)
    sum(losses.values()).backward()
    grad = predictions.boxes.grad
    assert grad.isfinite().all() and not grad[..., 8:].any() and grad[..., :8].any()


def test_padding_and_unmatched_queries_get_no_box_gradient():
    boxes, labels = truth(1, 3)
    made = make_denoising(boxes, labels, 4, RANGE, groups=1)
    predictions = random_predictions(2, 3 + 4)
    sum(detection_losses(predictions, boxes, labels, made).values()).backward()
    touched = predictions.boxes.grad.abs().sum(-1) > 0
    assert touched[:, :, :3].tolist() == [[[True, False, False], [True, True, True]]] * 2
    assert touched[:, :, 3:].sum(dim=2).tolist() == [[1, 3]] * 2
    classified = predictions.logits.grad.abs().sum(-1) > 0
    assert torch.equal(classified[:, :, :3], touched[:, :, :3]) and classified[:, :, 3:].all()


@pytest.mark.parametrize("with_denoising", [True, False])
def test_no_ground_truth(with_denoising):
    boxes, labels = truth(0, 0)
    made = make_denoising(boxes, labels, 5, RANGE) if with_denoising else None
    predictions = random_predictions(2, 5)
    losses = detection_losses(predictions, boxes, labels, made)
    background = sum(focal(logit, False) for logit in predictions.logits.flatten().tolist())  # 10 queries · 0.1 is 1
    assert losses["cls"].item() == pytest.approx(background, rel=1e-5)
    assert losses["box"] == losses["dn_cls"] == losses["dn_box"] == 0
    assert all(loss.requires_grad for loss in losses.values())
    sum(losses.values()).backward()
    assert predictions.logits.grad.any() and not predictions.boxes.grad.any()


def test_hostile_ground_truth_leaves_losses_finite():
    boxes, labels = truth(5)
    boxes[0][0, 0], boxes[0][1, 3], boxes[0][2, 6], boxes[0][3, 1] = torch.nan, 0.0, torch.inf, 1e30
    made = make_denoising(boxes, labels, 9, RANGE)
    predictions = random_predictions(1, made.reference.shape[1] + 9)
    losses = detection_losses(predictions, boxes, labels, made)
    sum(losses.values()).backward()
    assert predictions.boxes.grad.isfinite().all() and predictions.logits.grad.isfinite().all()
    assert all(loss.isfinite() for loss in losses.values())


def steps_of_heads(steps):
    """The losses of heads on fixed random states, as in training: denoising and matching queries, Adam."""
    torch.manual_seed(7)
    boxes, labels = truth(3, 2)
    heads = TaskHeads(32, 2, classes=CLASSES, hidden=16)
    states, reference = torch.randn(2, 2, 6 + 8, 32), torch.rand(2, 8, 3)
    made = make_denoising(boxes, labels, 8, RANGE)
    reference = torch.cat([made.reference, reference], dim=1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    history = []
    for _ in range(steps):
        total = sum(detection_losses(heads(states, reference, RANGE), boxes, labels, made).values())
        history.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return history


def test_training_repeats_bit_for_bit():
    first = steps_of_heads(5)
    assert first == steps_of_heads(5) and first[-1] < first[0]


def test_refusals():
    boxes, labels = truth(2, 1)
    predictions = random_predictions(2, 5)
    with pytest.raises(ValueError, match=r"detection_losses: predictions.logits has shape \(2, 2, 5, 4\), needs"):
        detection_losses(predictions, boxes[:1], labels[:1])
    with pytest.raises(ValueError, match=r"detection_losses: labels\[1\] has values from 4 to 4, needs 0 to 3"):
        detection_losses(predictions, boxes, [labels[0], torch.tensor([4])])
    made = make_denoising(boxes, labels, 5, RANGE)
    with pytest.raises(ValueError, match="detection_losses: predictions has 5 queries, needs 9 like denoising"):
        detection_losses(predictions, boxes, labels, made)
    with pytest.raises(ValueError, match=r"match: boxes has shape \(5, 9\), needs \(N, 10\) = \(5, 10\)"):
        match(torch.zeros(5, CLASSES), torch.zeros(5, 9), boxes[0], labels[0])
    with pytest.raises(TypeError, match=r"match: labels\[0\] is float32, needs int64"):
        match(torch.zeros(5, CLASSES), torch.zeros(5, 10), boxes[0], labels[0].float())


def test_predictions_that_are_all_lost_have_no_small_loss():
    boxes, labels = truth(3, 2)
    logits, code = torch.zeros(1, 2, 6, CLASSES), torch.full((1, 2, 6, 10), torch.nan)
    losses = detection_losses(Predictions(logits, code), boxes, labels)
    assert losses["box"].isnan() and losses["cls"].isfinite()
    code[0, 0, 0] = 0.0
    assert detection_losses(Predictions(logits, code), boxes, labels)["box"].isfinite()
