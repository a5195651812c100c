"""The whole detector, small: what every generation of AQR must keep."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rigfuse.modules.backbones import FPN, BackboneConfig, ResNet
from rigfuse.modules.cmt_aqr.aqr import GENERATIONS, AQRConfig
from rigfuse.modules.cmt_aqr.detector import CmtAqr
from rigfuse.modules.cmt_aqr.encodings import CoordinateEncoding
from rigfuse.modules.cmt_aqr.head import TaskHeads
from rigfuse.modules.cmt_aqr.transformer import DecoderConfig, QueryDecoder
from rigfuse.modules.detection.batch import DetectionInput
from rigfuse.modules.detection.dense import DenseHead
from rigfuse.modules.lidar.second import SECOND, SECONDNeck, SparseMiddleEncoder
from rigfuse.modules.lidar.voxels import VoxelEncoder
from rigfuse.modules.maps_layout import MapLayout
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig

C, QUERIES, LAYERS = 32, 12, 2
RANGE = (-12.8, -12.8, -3.0, 12.8, 12.8, 5.0)
LAYOUT = MapLayout((8, 8), (2, 3), point_range=RANGE)
RIG = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.04, crop=(8, 4, 48, 32)))


def detector(generation="v3", frozen=False, dropout=0.0, checkpoint=False, seed=3) -> CmtAqr:
    torch.manual_seed(seed)
    stages = dict(frozen_stages=4 if frozen else -1, norm_eval=frozen)
    voxels = VoxelEncoder(RANGE, (1.6, 1.6, 2.0), channels=8)
    decoder = DecoderConfig(LAYERS, heads=2, feedforward=48, dropout=dropout, checkpoint=checkpoint)
    parts = dict(
        img_backbone=ResNet(BackboneConfig("tiny", **stages), (16, 32)),
        img_neck=FPN((64, 128), C, levels=1),
        pts_voxel_encoder=voxels,
        pts_middle_encoder=SparseMiddleEncoder(8, voxels.spatial_shape, channels=(8, 16), blocks=1),
        pts_backbone=SECOND(16, (16, 16), (1, 1), **stages),
        pts_neck=SECONDNeck((16, 16), (C, C)),
        shared_conv=nn.Sequential(nn.Conv2d(2 * C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU()),
        query_embed=CoordinateEncoding(C, LAYOUT, depths=8),
        transformer=QueryDecoder(C, decoder),
        task_heads=TaskHeads(C, LAYERS, hidden=16),
    )
    learns, evidence = generation == "v3", "point" if generation == "v2" else "window"
    aqr = AQRConfig(generation, evidence, C, 2, 24, window_sizes=(2, 3), learnable_scale=learns)
    weights, bias = aqr.build(C, LAYOUT)
    parts |= dict(aqr_weight_generator=weights, attention_bias_generator=bias)
    model = CmtAqr(**parts, queries=QUERIES, generation=generation, denoising_groups=2)
    return model if frozen else calibrated(model)


def calibrated(model: CmtAqr) -> CmtAqr:
    """With the statistics of a batch, or the maps would all but vanish in evaluation."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    batch = make_batch(1)
    with torch.no_grad():
        model.camera_maps(batch.images)
        model.bev_map(batch.points)
    for norm in norms:
        norm.momentum = 0.1
    return model


def with_weights(model: CmtAqr, std=0.5) -> CmtAqr:
    """AQR's weights away from zero."""
    nn.init.normal_(model.aqr_weight_generator.last.weight, std=std)
    return model


def make_batch(size=2) -> DetectionInput:
    """The first sample has everything, the second no points, the third no images."""
    low, high = torch.tensor(RANGE[:3]), torch.tensor(RANGE[3:])
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    points = [torch.cat([low + (high - low) * rand(150, 3), rand(150, 2)], dim=1) for _ in range(size)]
    boxes = []
    for count in (3, 1, 2)[:size]:
        place, rest = low + (high - low) * rand(count, 3), [rand(count, 3) * 3 + 1, rand(count, 3)]
        boxes.append(torch.cat([place, *rest], dim=1))
    images = torch.randn(size, 6, 3, 32, 48, generator=generator)
    if size > 1:
        points[1] = points[1][:0]
    if size > 2:
        images[2] = 0
    labels = [torch.arange(len(own)) for own in boxes]
    image_T_ego = RIG.image_T_ego.expand(size, -1, -1, -1)
    return DetectionInput(images, image_T_ego, points, boxes, labels, [str(index) for index in range(size)])


def one(batch: DetectionInput, index: int) -> DetectionInput:
    parts = {name: part for name, part in vars(batch).items() if part is not None}
    return DetectionInput(**{name: part[index : index + 1] for name, part in parts.items()})


def norms_eval(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def total(output):
    return sum(output.losses.values())


def backward(model, batch):
    """Gradients by name, in training, the same noise every time."""
    torch.manual_seed(11)
    total(model(batch)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_gradient_reaches_every_parameter(generation):
    model = detector(generation).train()
    if generation != "none":
        with_weights(model)
    batch = make_batch(3)
    output = model(batch)
    assert set(output.losses) == {"cls", "box", "dn_cls", "dn_box"} and all(x > 0 for x in output.losses.values())
    if generation != "none":  # by way of the encoding, as the heads do not enter
        assert torch.autograd.grad(output.weights.sum(), model.reference_points)[0].any()
    grads = backward(model, batch)
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    # The first layer's queries are empty, so its self-attention sees only its own biases; and a softmax sees no shift.
    idle = "transformer.layers.0.self_attention."
    zero = {name for name, grad in grads.items() if not grad.any()}
    assert {name for name in zero if not name.startswith(idle) and not name.endswith("key.bias")} == set()


@pytest.mark.parametrize("generation", ["v1", "v2", "v3"])
def test_every_generation_starts_as_the_detector_without_aqr(generation):
    plain, routed, batch = detector("none").eval(), detector(generation).eval(), make_batch()
    missing, unexpected = routed.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"aqr_weight_generator", "attention_bias_generator"}
    assert not unexpected
    with torch.no_grad():
        expected, untrained = plain(batch), routed(batch)
        torch.testing.assert_close(vars(untrained.predictions), vars(expected.predictions), rtol=1e-4, atol=1e-5)
        assert not untrained.weights.any() and expected.weights is None and not expected.figures
        later = with_weights(routed, std=5.0)(batch)
    assert (later.predictions.boxes - untrained.predictions.boxes).abs().max() > 1e-3
    assert later.weights.shape == (2, QUERIES, 2) and later.weights.abs().max() <= 1
    torch.testing.assert_close(later.figures["aqr/weight_lidar"], later.weights[..., 1].abs().mean())
    assert ("aqr/bias_scale" in later.figures) == (generation == "v3")


def test_tokens_stand_where_their_encodings_say():
    model, batch, seen = detector().eval(), make_batch(3), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        output = model(batch)
        bev, images = model.bev_map(batch.points), model.camera_maps(batch.images)
    bev_tokens, image_tokens = seen[0].split([64, 36], dim=1)
    for row, column in ((0, 0), (2, 5), (7, 3)):
        assert torch.equal(bev_tokens[:, row * 8 + column], bev[:, :, row, column])
    for view, row, column in ((0, 0, 0), (2, 1, 2), (5, 0, 1)):
        assert torch.equal(image_tokens[:, (view * 2 + row) * 3 + column], images[:, view, :, row, column])
    low, high = torch.tensor(RANGE[:3]), torch.tensor(RANGE[3:])
    torch.testing.assert_close(output.reference[2], low + (high - low) * model.reference_points)


def test_the_scale_learns_once_there_are_weights():
    model, batch = detector("v3").train(), make_batch()
    assert backward(model, batch)["attention_bias_generator.bias_scale"] == 0
    assert model.aqr_weight_generator.last.weight.grad.any()
    assert backward(with_weights(detector("v3").train()), batch)["attention_bias_generator.bias_scale"] != 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_samples_do_not_see_one_another(generation):
    """Those without points or without images neither."""
    model, batch = detector(generation).eval(), make_batch(3)
    if generation != "none":
        with_weights(model)
    with torch.no_grad():
        together = model(batch).predictions
        for index in range(3):
            alone = model(one(batch, index)).predictions
            for name in ("logits", "boxes"):
                part = getattr(together, name)[:, index]
                torch.testing.assert_close(getattr(alone, name)[:, 0], part, rtol=1e-4, atol=1e-4)
    found = model.detect(batch)
    assert len(found) == 3 and all(x.boxes.shape[1] == 9 and x.boxes.isfinite().all() for x in found)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_matching_queries_know_nothing_of_the_denoising_ones(generation):
    model, batch = norms_eval(detector(generation).train()), make_batch()
    if generation != "none":
        with_weights(model)
    with torch.no_grad():
        training = model(batch)
        inference = model.eval()(replace(batch, boxes=[], labels=[]))
    assert training.losses["dn_cls"] > 0 and not inference.losses
    torch.testing.assert_close(vars(training.predictions), vars(inference.predictions), rtol=1e-4, atol=1e-4)
    assert torch.equal(training.reference, inference.reference)


def test_without_a_box_there_is_nothing_to_denoise():
    batch = make_batch()
    empty = replace(batch, boxes=[x[:0] for x in batch.boxes], labels=[x[:0] for x in batch.labels])
    losses = detector().train()(empty).losses
    assert losses["cls"] > 0 and losses["box"] == losses["dn_cls"] == losses["dn_box"] == 0


def test_checkpointing_changes_no_gradient():
    batch = make_batch()
    plain, kept = (with_weights(detector(dropout=0.2, checkpoint=x).train()) for x in (False, True))
    kept.load_state_dict(plain.state_dict())
    expected, actual = backward(plain, batch), backward(kept, batch)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


def saved_bytes(model, batch) -> int:
    """What a forward pass keeps for backward, parameters left out."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = total(model(batch))
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_frozen_branches_do_not_move_and_keep_nothing_for_backward():
    frozen, batch = detector(frozen=True).train(), make_batch()
    frozen.pts_voxel_encoder.requires_grad_(False).eval()
    frozen.pts_middle_encoder.requires_grad_(False).eval()
    branches = ("img_backbone", "pts_voxel_encoder", "pts_middle_encoder", "pts_backbone")
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    grads = backward(frozen, batch)
    with torch.no_grad():
        for parameter in frozen.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert all((grad is None) == name.startswith(branches) for name, grad in grads.items())
    moved = {name for name, value in frozen.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith(branches) for name in moved)

    kept = saved_bytes(frozen, batch)
    for name in branches:
        part = getattr(frozen, name)
        part.forward = torch.no_grad()(part.forward)
    assert kept == saved_bytes(frozen, batch) < 0.75 * saved_bytes(detector().train(), batch)


def test_routing_keeps_its_keys_and_values_and_no_tokens_twice():
    """What it makes them of, the decoder keeps anyway: kept twice, it would be 3 % of a step's memory more."""
    batch = make_batch()
    without, routed = (saved_bytes(detector(generation).train(), batch) for generation in ("none", "v3"))
    tokens = LAYOUT.bev_shape[0] * LAYOUT.bev_shape[1] + 6 * LAYOUT.view_shape[0] * LAYOUT.view_shape[1]
    size = len(batch.images) * tokens * C * 4  # bytes
    assert 2 * size <= routed - without < 4 * size  # less than two more for what the queries need


def test_state_dict_round_trip():
    first, second, batch = with_weights(detector()).eval(), detector(seed=4).eval(), make_batch()
    with torch.no_grad():
        expected = first(batch).predictions.boxes
        assert not torch.equal(second(batch).predictions.boxes, expected)
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(batch).predictions.boxes, expected)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_mixed_precision(generation):
    model, batch = detector(generation).train(), make_batch()
    if generation != "none":
        with_weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    total(output).backward()
    assert output.predictions.logits.dtype == output.predictions.boxes.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model.eval()(batch).predictions
    with torch.no_grad():
        wide = model(batch).predictions
    assert (narrow.boxes - wide.boxes).abs().max() < 0.05 * wide.boxes.abs().max()


def test_what_does_not_fit_is_refused():
    model, batch = detector().eval(), make_batch()
    with pytest.raises(ValueError, match=r"images has shape .* makes maps of \(4, 3\), needs \(2, 3\)"):
        model(replace(batch, images=torch.zeros(2, 6, 3, 64, 48)))
    with pytest.raises(ValueError, match="points of 1 samples and images of 2"):
        model(replace(batch, points=batch.points[:1]))
    parts, counts = dict(model.named_children()), dict(queries=QUERIES, denoising_groups=2)
    with pytest.raises(ValueError, match="generation is 'v4', needs one of none, v1, v2, v3"):
        CmtAqr(**parts, **counts, generation="v4")
    with pytest.raises(ValueError, match="generation is 'none', needs neither"):
        CmtAqr(**parts, **counts, generation="none")
    with pytest.raises(ValueError, match="generation is 'v2', needs both"):
        CmtAqr(**{**parts, "attention_bias_generator": None}, **counts, generation="v2")
    with pytest.raises(ValueError, match="queries is 0"):
        CmtAqr(**parts, generation="v3", queries=0, denoising_groups=0)


def test_queries_can_begin_near_their_place():
    """A random start looks everywhere alike; with nearness half of the heads look at the BEV cells round the query,
    half at the cameras' cells that may show it, whichever the layer."""
    layout = MapLayout((16, 16), (4, 6), point_range=RANGE)
    projection = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.08, crop=(8, 8, 96, 64))).image_T_ego[None]
    points = torch.tensor([[x, y, 0.5] for x in (-9.0, 0.3, 7.0) for y in (-6.0, 4.4)])[None]
    cells = layout.cells(points, projection)
    on_bev = (cells[0, :, :1] - cells_of(16, 16)).norm(dim=-1) < 3
    on_views = (cells[0, :, 1:, None] - cells_of(4, 6)).norm(dim=-1).flatten(1) < 1.5
    assert on_views.any(1).all()

    def shares(heads, nearness):
        """What of each head's attention falls near the queries, on the BEV map and on the cameras', (layers, 2, 2)."""
        torch.manual_seed(3)
        encodings = CoordinateEncoding(C, layout, depths=8, heads=heads)
        keys, queries = encodings.memory(projection), encodings.queries(points, projection, cells)
        found = []
        for layer in QueryDecoder(C, DecoderConfig(LAYERS, heads=2), nearness=nearness).layers:
            attention = layer.cross_attention
            q, k = (x.unflatten(-1, (2, -1)) for x in (attention.query(queries), attention.key(keys)))
            weights = (torch.einsum("bnhd,blhd->bhnl", q, k) / q.shape[-1] ** 0.5).softmax(-1)[0]
            weights = weights * torch.cat([on_bev, on_views], dim=1)
            found.append(torch.stack([part.sum(-1).mean(-1) for part in weights.split([256, 6 * 24], dim=-1)], dim=1))
        return torch.stack(found)

    everywhere = torch.stack([on_bev.sum(1).float().mean(), on_views.sum(1).float().mean()]) / 400
    with torch.no_grad():
        torch.testing.assert_close(shares(0, 0.0), everywhere.expand(LAYERS, 2, 2), rtol=0.5, atol=0)
        near = shares(2, 2.0)
    assert (near[:, 0, 0] > 0.4).all() and (near[:, 1, 1] > 0.4).all()


def test_a_sample_without_points_leaves_the_others_alone():
    """In training too, where batch norms take the statistics of the batch; its own map is zeros, asked nothing."""
    model, batch = detector().train(), make_batch(3)
    model.dense_head = DenseHead(C, LAYOUT)
    maps = model.bev_map(batch.points)
    assert torch.equal(maps[[0, 2]], model.bev_map([batch.points[0], batch.points[2]])) and not maps[1].any()
    nothing = model.bev_map([batch.points[1]])
    assert nothing.shape == maps[:1].shape and not nothing.any()
    nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in model.pts_backbone.parameters())
    norms_eval(model)
    moved = replace(batch, boxes=[boxes * (1 + 0.1 * (place == 1)) for place, boxes in enumerate(batch.boxes)])
    assert model(moved).losses["dense_box"] == model(batch).losses["dense_box"]


def cells_of(height, width):
    """(H·W, 2) cells (u, v), row after row."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1).float()
