"""The detector on upstream's weights gives CMT's numbers: layer by layer, decoded boxes, and every loss of one step."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rigfuse.modules.cmt_aqr import detector as detector_module
from rigfuse.modules.cmt_aqr.detector import UPSTREAM_RANGE, DetectorConfig, as_upstream
from rigfuse.modules.cmt_aqr.upstream_names import convert, converted
from rigfuse.modules.detection.batch import DetectionInput
from rigfuse.modules.detection.boxes import decode
from rigfuse.modules.detection.denoising import BACKGROUND, Denoising, kept_share
from rigfuse.modules.detection.losses import layer_losses, match
from support.golden import golden_sets

SETS = golden_sets("cmt_head")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of CMT's head beside the checkout")
each_set = pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
STRIDE = 16  # image pixels in a cell of the network here
WEIGHTS = dict(cls=2.0, box=0.25, dn_cls=2.0, dn_box=0.25)


def tensors(folder, file):
    return {name: torch.from_numpy(value) for name, value in folder.load(file).items()}


def detector(folder, generation="none"):
    """With the set's weights, in evaluation mode; what comes before the maps is small and not looked at."""
    settings = folder.settings
    config = as_upstream(DetectorConfig())
    config.channels, config.queries, config.depths = settings["hidden"], settings["queries"], settings["depths"]
    config.cameras, config.aqr.generation = settings["cameras"], generation
    decoder = config.decoder
    decoder.layers, decoder.heads = settings["decoder_layers"], settings["heads"]
    weights = tensors(folder, "weights")
    decoder.feedforward = len(weights["transformer.decoder.layers.0.ffns.0.layers.0.0.bias"])
    config.camera.resnet, config.lidar.channels, config.lidar.second, config.lidar.layers = "tiny", (8, 8), (8, 8), 0
    height, width = settings["bev_hw"]
    config.lidar.grid = (4, 2 * height, 2 * width)
    image_size = tuple(cells * STRIDE for cells in settings["image_feature_hw"])
    model = config.build(image_size, UPSTREAM_RANGE)
    model.shared_conv[0] = nn.Conv2d(settings["lidar_channels"], config.channels, 3, padding=1, bias=False)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("img_", "pts_"))}
    model.load_state_dict(convert(weights, own, decoder.layers), strict=False)
    return model.eval()


def projections(folder):
    """Into images in which a cell has the size that the network here is built for, whatever size it had there."""
    arrays = tensors(folder, "inputs")
    height, width = arrays["image_features"].shape[-2:]
    high, wide, _ = arrays["pad_shape"].tolist()
    return (
        torch.diag(torch.tensor([STRIDE * width / wide, STRIDE * height / high, 1, 1]).double()) @ arrays["lidar2img"]
    )


def decide(model, folder, boxes=(), labels=()):
    arrays, batch = tensors(folder, "inputs"), folder.settings["batch"]
    images, projection = arrays["image_features"].unflatten(0, (batch, -1)), projections(folder)
    bev = model.shared_conv(arrays["bev"])
    return model.decide(bev, images, DetectionInput(images, projection, [], list(boxes), list(labels), []))


@cache
def evaluated(folder):
    """What the detector says, what its parts said on the way, and the same of one whose routing has learned nothing,
    where its operation takes heads of that size."""
    model, seen, hooks = detector(folder), {}, []
    for name, module in model.named_modules():
        keep = lambda _, __, found, name=name: seen.update({name: found})  # noqa: E731
        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        outputs = [decide(model, folder)]
        if folder.settings["hidden"] >= 16 * folder.settings["heads"]:
            outputs.append(decide(detector(folder, "v3"), folder))
    return SimpleNamespace(model=model, seen=seen, outputs=outputs)


def as_heads_say(boxes):
    """Encoded boxes (…, 10) of this toolkit in the channels of upstream's heads, by what these mean."""
    x, y, z, log_length, log_width, log_height, sin, cos, vx, vy = boxes.unbind(-1)
    stacked = dict(center=[x, y], height=[log_width], dim=[log_length, z, log_height], rot=[-cos, -sin], vel=[vx, vy])
    return {name: torch.stack(parts, dim=-1) for name, parts in stacked.items()}


def as_their_boxes(boxes):
    """Boxes (…, 9) as upstream has them: z of the bottom, width before length, yaw clockwise from −y."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, z - height / 2, width, length, height, -yaw - math.pi / 2, vx, vy], dim=-1)


def as_our_boxes(boxes, from_bottom=True):
    x, y, z, width, length, height, yaw, vx, vy = boxes.unbind(-1)
    z = z + height / 2 if from_bottom else z
    return torch.stack([x, y, z, length, width, height, -yaw - math.pi / 2, vx, vy], dim=-1)


def close(actual, expected, limit, name=""):
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max()
    assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.0e}"


def compare(predictions, arrays, folder, prefix):
    """Holds every head to the array of its name, and each array of that prefix to being a head's."""
    limit = folder.about["tolerance"]["predictions"]
    ours = as_heads_say(predictions.boxes) | dict(cls_logits=predictions.logits)
    theirs = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        close(ours[name], expected, limit, prefix + name)


@each_set
def test_predictions_of_every_layer(folder):
    run, arrays = evaluated(folder), tensors(folder, "outputs")
    for output in run.outputs:
        compare(output.predictions, arrays, folder, "predictions/")


@each_set
def test_decoded_boxes(folder):
    arrays, limit = tensors(folder, "outputs"), folder.about["tolerance"]["predictions"]
    found = decode(evaluated(folder).outputs[0].predictions, top=folder.settings["decoded_boxes"])
    for sample, detections in enumerate(found):
        expected = {name: arrays[f"decoded/{sample}/{name}"] for name in ("boxes", "scores", "labels")}
        assert torch.equal(detections.labels, expected["labels"])
        close(detections.scores, expected["scores"], limit)
        difference = as_their_boxes(detections.boxes) - expected["boxes"]
        difference[:, 6] = torch.remainder(difference[:, 6] + math.pi, 2 * math.pi) - math.pi
        size = detections.boxes[:, 3:6].amax(dim=1, keepdim=True).clamp(min=1)  # exponentials of what is compared above
        assert (difference / size).abs().max() <= 5 * limit


@each_set
def test_every_layer(folder):
    run, arrays = evaluated(folder), tensors(folder, "intermediate")
    seen, limit = run.seen, folder.about["tolerance"]["predictions"]
    cells = math.prod(folder.settings["bev_hw"])
    with torch.no_grad():
        memory = run.model.query_embed.memory(projections(folder))
    close(seen["shared_conv"], arrays["shared_conv"], limit)
    close(memory[0, :cells], arrays["bev_position_embedding"], limit)
    images = arrays["image_position_embedding"]
    close(memory[:, cells:], images.reshape(len(memory), -1, images.shape[-1]), limit)
    close(seen["transformer"], arrays["decoder_states"], limit)
    for index in range(folder.settings["decoder_layers"]):
        here = f"transformer.layers.{index}"
        close(seen[here], arrays[f"decoder.layers.{index}"].transpose(0, 1), limit, here)


def golden_denoising(folder, arrays):
    """The noisy queries that were drawn, as `make_denoising` would have returned them."""
    padding, batch = int(arrays["dn/pad_size"]), folder.settings["batch"]
    place = arrays["dn/sample_of_known"], arrays["dn/slot_of_known"]
    boxes, labels = torch.ones(batch, padding, 9), torch.full((batch, padding), BACKGROUND)
    valid = torch.zeros(batch, padding, dtype=torch.bool)
    boxes[place], valid[place] = as_our_boxes(arrays["dn/known_boxes"], from_bottom=False), True
    labels[place] = torch.where(
        arrays["dn/known_labels_with_noise"] < 10, arrays["dn/known_labels_with_noise"], BACKGROUND
    )
    reference = arrays["dn/reference_points"][:, :padding]
    return Denoising(reference, boxes, labels, valid, ~arrays["dn/attn_mask"], kept_share(0.75))


@each_set
def test_a_training_step_with_its_noise(folder, monkeypatch):
    arrays = tensors(folder, "training")
    denoising = golden_denoising(folder, arrays)
    monkeypatch.setattr(detector_module, "make_denoising", lambda *_, **__: denoising)
    samples = range(folder.settings["batch"])
    boxes = [gt.clone() for gt in (arrays[f"gt/boxes/{sample}"] for sample in samples)]
    boxes, labels = [as_our_boxes(gt) for gt in boxes], [arrays[f"gt/labels/{sample}"] for sample in samples]
    model = detector(folder)
    model.training, seen = True, []  # dropout and norms stay as in evaluation
    model.task_heads.register_forward_hook(lambda _, __, found: seen.append(found))
    output = decide(model, folder, boxes, labels)

    predictions, padding = seen[0], denoising.reference.shape[1]
    known, matching = (
        type(predictions)(*both)
        for both in zip(*(x.tensor_split([padding], dim=2) for x in (predictions.logits, predictions.boxes)))
    )
    compare(known, arrays, folder, "predictions/dn_")
    compare(matching, {n: x for n, x in arrays.items() if "/dn_" not in n}, folder, "predictions/")
    for sample in samples:
        for layer, (logits, code) in enumerate(zip(matching.logits[:, sample], matching.boxes[:, sample])):
            query, gt = match(logits, code, boxes[sample], labels[sample])
            expected = arrays[f"match/layer{layer}/sample{sample}"]
            place = labels[sample].argsort(stable=True).argsort()  # upstream numbers the truth class by class
            assert torch.equal(torch.zeros_like(expected).index_put((query,), place[gt] + 1), expected)

    limit = folder.about["tolerance"]["losses_relative"]
    layers, by_layer = len(predictions.logits), layer_losses(predictions, boxes, labels, denoising)
    names = dict(cls="loss_cls", box="loss_bbox", dn_cls="dn_loss_cls", dn_box="dn_loss_bbox")
    for name, theirs in names.items():
        for layer, loss in enumerate(WEIGHTS[name] * by_layer[name]):
            last = layer == layers - 1
            expected = arrays[f"loss/{theirs}" if last else f"loss/d{layer}.{theirs}"]
            assert abs(loss - expected) <= limit * abs(expected), (name, layer)
    total = sum(WEIGHTS[name] * loss for name, loss in output.losses.items())
    assert abs(total - arrays["total"]) <= limit * arrays["total"]
    total.backward()
    compare_gradients(model, arrays, layers, tensors(folder, "weights"))


def compare_gradients(model, arrays, layers, weights):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = [name.removeprefix("grad_norm/") for name in arrays if name.startswith("grad_norm/")]
    assert len(names) > 50
    largest = max(arrays[f"grad_norm/{name}"] for name in names)
    for name in names:
        ours = [gradients[place] for place in converted(name, weights[name], layers)]
        norm = torch.stack([gradient.norm() for gradient in ours]).norm()
        expected = arrays[f"grad_norm/{name}"]
        assert abs(norm - expected) <= 1e-3 * max(expected, 1e-3 * largest), name
        if f"grad/{name}" in arrays:
            for place, expected in converted(name, arrays[f"grad/{name}"], layers).items():
                assert (gradients[place] - expected).norm() <= 2e-3 * max(expected.norm(), 1e-3 * largest), place
