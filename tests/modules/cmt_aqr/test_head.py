import pytest
import torch

from rigfuse.modules.cmt_aqr.head import TaskHeads
from rigfuse.modules.detection.boxes import DETECTION_CLASSES, decode

RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)


def by_hand(heads, states, reference):
    """The heads' definition, one layer at a time in float64."""
    low, high = torch.tensor(RANGE, dtype=torch.float64).split(3)
    logits, boxes = [], []
    for layer, state in enumerate(states.double()):
        out = {}
        for name, task in heads.tasks.items():
            hidden = state @ task.weight_in[layer].double()
            mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, correction=0, keepdim=True)
            hidden = (hidden - mean) / (variance + 1e-6).sqrt() * task.norm_scale[layer, 0] + task.norm_shift[layer, 0]
            out[name] = hidden.clamp(min=0) @ task.weight_out[layer].double() + task.bias_out[layer, 0]
        before = reference.double().clamp(1e-5, 1 - 1e-5)
        moved = torch.cat([out["center"], out["height"]], dim=-1) + before.log() - (1 - before).log()
        center = low + (high - low) / (1 + (-moved).exp())
        logits.append(out["logits"])
        boxes.append(torch.cat([center, out["dim"], out["rot"], out["vel"]], dim=-1))
    return torch.stack(logits), torch.stack(boxes)


def perturbed(heads):
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


def test_heads_are_separate_mlps_of_each_layer():
    heads = perturbed(TaskHeads(24, 3, classes=4, hidden=8))
    states, reference = torch.randn(3, 2, 5, 24), torch.rand(2, 5, 3)
    reference[0, 0] = torch.tensor([0.0, 1.0, 0.5])  # on the edge
    predictions = heads(states, reference, RANGE)
    logits, boxes = by_hand(heads, states, reference)
    torch.testing.assert_close(predictions.logits.double(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predictions.boxes.double(), boxes, rtol=1e-4, atol=1e-4)
    low, high = torch.tensor(RANGE).split(3)
    center = predictions.boxes[..., :3]
    assert ((center >= low) & (center <= high)).all()


def test_heads_start_at_the_prior_and_at_the_reference():
    heads, reference = TaskHeads(256, 6), torch.rand(1, 900, 3)
    predictions = heads(torch.randn(6, 1, 900, 256), reference, RANGE)
    assert predictions.logits.shape == (6, 1, 900, len(DETECTION_CLASSES)) and predictions.boxes.shape == (
        6,
        1,
        900,
        10,
    )
    assert predictions.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.3)
    low, high = torch.tensor(RANGE).split(3)
    off = (predictions.boxes[..., :3] - low) / (high - low) - reference
    assert off.abs().mean() < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_run_in_float32_under_autocast(dtype):
    heads = TaskHeads(16, 2, hidden=8)
    states, reference = torch.randn(2, 1, 7, 16).to(dtype), torch.rand(1, 7, 3)
    with torch.autocast("cpu", dtype=dtype):
        under = heads(states, reference, RANGE)
    plain = heads(states.float(), reference, RANGE)
    assert torch.equal(under.logits, plain.logits) and torch.equal(under.boxes, plain.boxes)


def test_heads_give_gradients_to_states_reference_and_every_parameter():
    heads = TaskHeads(16, 2, classes=3, hidden=8)
    states, reference = torch.randn(2, 2, 3, 16, requires_grad=True), torch.rand(2, 3, 3, requires_grad=True)
    predictions = heads(states, reference, RANGE)
    (predictions.logits.square().sum() + predictions.boxes.square().sum()).backward()
    for tensor in (states, reference, *heads.parameters()):
        assert tensor.grad.isfinite().all() and (tensor.grad != 0).any()


def test_a_reference_at_or_beyond_the_edge_can_still_move():
    heads = TaskHeads(16, 1, hidden=8)
    states = torch.randn(1, 1, 4, 16, requires_grad=True)
    reference = torch.tensor([0.0, 1.0, -0.3, 1.4])[None, :, None].repeat(1, 1, 3).requires_grad_()
    centers = heads(states, reference, RANGE).boxes[..., :3]
    assert centers.isfinite().all()
    centers.sum().backward()
    assert reference.grad.isfinite().all() and states.grad.isfinite().all()
    assert (states.grad.abs().sum(dim=-1) > 0).all()


def test_heads_take_no_queries():
    predictions = TaskHeads(16, 2)(torch.zeros(2, 3, 0, 16), torch.zeros(3, 0, 3), RANGE)
    assert predictions.logits.shape == (2, 3, 0, 10) and predictions.boxes.shape == (2, 3, 0, 10)
    assert [len(found.boxes) for found in decode(predictions)] == [0, 0, 0]


def test_refusals():
    heads = TaskHeads(16, 2)
    with pytest.raises(ValueError, match=r"TaskHeads: states has shape \(3, 1, 4, 16\), needs \(layers, B, N, C\)"):
        heads(torch.zeros(3, 1, 4, 16), torch.zeros(1, 4, 3), RANGE)
    with pytest.raises(ValueError, match="TaskHeads: reference has shape"):
        heads(torch.zeros(2, 1, 4, 16), torch.zeros(1, 5, 3), RANGE)
    with pytest.raises(ValueError, match="TaskHeads: point_range is"):
        heads(torch.zeros(2, 1, 4, 16), torch.zeros(1, 4, 3), (0, 0, 0, 1, 1, 0))
