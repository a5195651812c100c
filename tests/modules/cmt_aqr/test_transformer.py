import math

import pytest
import torch
import torch.nn.functional as F

from rigfuse.modules.cmt_aqr.aqr import AQRConfig, AQRWeightGenerator, AttentionBiasGenerator, token_maps
from rigfuse.modules.cmt_aqr.encodings import CoordinateEncoding
from rigfuse.modules.cmt_aqr.transformer import DecoderConfig, QueryDecoder
from rigfuse.modules.maps_layout import MapLayout
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig
from support.networks import with_noise

NAN = math.nan
LAYOUT = MapLayout((6, 5), (4, 10), stride=80)  # of images of 800×320 pixels
TOKENS = 6 * 5 + 6 * 4 * 10
RIG = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.5, crop=(0, 130, 800, 320)))
IMAGE_T_EGO = RIG.image_T_ego.expand(2, 6, 4, 4)
SMALL = dict(layers=2, heads=2, feedforward=48)


def generator(**settings):
    return AttentionBiasGenerator(LAYOUT, AQRConfig(window_sizes=(3, 2), **settings))


def references(batch=2, queries=7):
    return torch.rand(batch, queries, 3) * torch.tensor([100.0, 100.0, 6.0]) - torch.tensor([50.0, 50.0, 2.0])


def inputs(queries=7, dtype=torch.float64):
    shapes = ((2, queries, 32), (2, TOKENS, 32), (2, TOKENS, 32))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def decoder(**settings):
    return with_noise(QueryDecoder(32, DecoderConfig(**SMALL | settings)))


def routing_of(weights, reference, bias=None):
    bias = bias or generator().to(torch.promote_types(weights.dtype, torch.float32))
    return bias(weights, LAYOUT.cells(reference, IMAGE_T_EGO))


def dense_bias(routing):
    """(B, N, tokens), window by window."""
    parts = []
    strength = routing.bias_scale.clamp(routing.min_scale, routing.max_scale) * routing.weights
    strength = strength.clamp(-5, 5)
    for m, (height, width, window) in enumerate(routing.maps):
        first = (routing.centers[:, :, m] + 0.5).floor() - window // 2
        u, v = torch.arange(width), torch.arange(height)[:, None]
        left, top = first[..., 0, None, None], first[..., 1, None, None]
        inside = (u >= left) & (u < left + window) & (v >= top) & (v < top + window)
        parts.append((inside * strength[:, :, m, None, None]).flatten(2))
    return torch.cat(parts, dim=2)


def attention(module, query, key, value, bias=0.0):
    """Independent: the scores spelled out, head by head."""
    query, key, value = module.query(query), module.key(key), module.value(value)
    heads = []
    for q, k, v in zip(*(x.chunk(module.heads, dim=-1) for x in (query, key, value))):
        heads.append((q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v)
    return module.out(torch.cat(heads, dim=-1))


def decoded(module, query_pos, key, value, bias=0.0, mask=None):
    """Independent: the decoder as the papers write it."""
    x, outputs = torch.zeros_like(query_pos), []
    hidden = 0.0 if mask is None else torch.where(mask, 0.0, -torch.inf)
    for layer in module.layers:
        first, second, third = layer.norms
        x = first(x + attention(layer.self_attention, x + query_pos, x + query_pos, x, hidden))
        x = second(x + attention(layer.cross_attention, x + query_pos, key, value, bias))
        x = third(x + layer.feedforward[3](F.relu(layer.feedforward[0](x))))
        outputs.append(module.norm(x))
    return torch.stack(outputs)


@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_the_decoder_is_the_papers(routed):
    module, tensors = decoder().double().eval(), inputs()
    weights = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(7, 7) > 0.4
    mask.fill_diagonal_(True)
    routing = routing_of(weights, references()) if routed else None
    actual = module(*tensors, routing, mask)
    expected = decoded(module, *tensors, dense_bias(routing) if routed else 0.0, mask)
    assert actual.shape == (2, 2, 7, 32)
    torch.testing.assert_close(actual, expected)
    leaves = [*tensors, *module.parameters(), *([weights] if routed else [])]
    grad = torch.randn_like(actual)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (actual, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_zero_weights_are_the_baseline():
    module, tensors = decoder().eval(), inputs(dtype=torch.float32)
    routing = routing_of(torch.zeros(2, 7, 2), references())
    torch.testing.assert_close(module(*tensors, routing), module(*tensors), rtol=0, atol=1e-5)
    suppressed = routing_of(torch.tensor([-1.0, 1.0]).expand(2, 7, 2), references())
    assert not torch.allclose(module(*tensors, suppressed), module(*tensors), rtol=0, atol=1e-3)


def test_the_slope_of_the_scale_is_a_difference_of_losses():
    module, tensors = decoder().double().eval(), inputs()
    weights, reference = torch.rand(2, 7, 2, dtype=torch.float64) * 2 - 1, references()
    grad = torch.randn(2, 2, 7, 32, dtype=torch.float64)

    def loss(scale):
        bias = generator(bias_scale=scale).double()
        bias.bias_scale.data.fill_(scale)
        return (module(*tensors, routing_of(weights, reference, bias)) * grad).sum(), bias.bias_scale

    (slope,) = torch.autograd.grad(*loss(2.5))
    step = 1e-5
    difference = (loss(2.5 + step)[0] - loss(2.5 - step)[0]) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)
    assert slope.abs() > 1e-6


def test_the_bias_never_exceeds_the_largest_scale():
    """At a maximum of 1 a weight of 1 and one of 50 are the same."""
    module, tensors = decoder().eval(), inputs(dtype=torch.float32)
    bias, reference = generator(bias_scale=1.0, max_scale=1.0), references()
    one, fifty = (module(*tensors, routing_of(torch.full((2, 7, 2), w), reference, bias)) for w in (1.0, 50.0))
    assert torch.equal(one, fifty)


def test_who_may_attend():
    """Rows are queries that look, columns those looked at: a row sees a change where it is True, and only there."""
    module, (query_pos, key, value) = decoder().eval(), inputs(dtype=torch.float32)
    mask = torch.eye(7, dtype=torch.bool)
    mask[2, 5] = True
    before = module(query_pos, key, value, self_mask=mask)[-1]
    changed = query_pos.detach().clone()
    changed[:, 5] += 1
    after = module(changed, key, value, self_mask=mask)[-1]
    moved = [not torch.equal(before[:, i], after[:, i]) for i in range(7)]
    assert moved == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_checkpoints_change_nothing(routed):
    tensors, reference = inputs(dtype=torch.float32), references()
    weights, grad = torch.randn(2, 7, 2, requires_grad=True), torch.randn(2, 2, 7, 32)
    results = []
    for checkpoint in (False, True):
        module, bias = decoder(dropout=0.3, checkpoint=checkpoint).train(), generator()
        torch.manual_seed(5)
        out = module(*tensors, routing_of(weights, reference, bias) if routed else None)
        leaves = [*tensors, *module.parameters(), *([weights, bias.bias_scale] if routed else [])]
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(kept, again) for kept, again in zip(*results))


def test_checkpoints_compute_the_layers_again():
    module, calls = decoder(checkpoint=True).train(), []
    module.layers[0].feedforward[0].register_forward_hook(lambda *_: calls.append(1))
    module(*inputs(dtype=torch.float32)).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        module(*inputs(dtype=torch.float32))
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_autocast(dtype, routed):
    module, tensors = decoder(checkpoint=True).eval(), inputs(dtype=torch.float32)
    weights = torch.randn(2, 7, 2, requires_grad=True)
    routing = routing_of(weights.to(dtype), references()) if routed else None
    mask = torch.ones(7, 7, dtype=torch.bool)
    with torch.autocast("cpu", dtype=dtype):
        out = module(*tensors, routing, mask)
        gradients = torch.autograd.grad(out.float().sum(), [*tensors, *module.parameters()], allow_unused=True)
    expected = module(*tensors, routing, mask)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)


def whole_step(reference, dtype=torch.float32):
    """A detector's step from reference points to the decoder's output, the maps in `dtype`, without its backbones."""
    torch.manual_seed(0)
    encoding = CoordinateEncoding(32, LAYOUT, depths=4)
    routing_weights = with_noise(AQRWeightGenerator(32, token_maps(LAYOUT, (4, 3)), heads=2, feedforward=16))
    bias, module = generator(), decoder()
    bev, images = torch.randn(2, 32, 6, 5, requires_grad=True), torch.randn(2, 6, 32, 4, 10, requires_grad=True)
    leaves = [bev, images, reference]
    bev, images = bev.to(dtype), images.to(dtype)
    cells = LAYOUT.cells(reference, IMAGE_T_EGO)
    query_pos = encoding.queries(reference, IMAGE_T_EGO, cells)
    memory = torch.cat([bev.flatten(2).mT, images.flatten(3).mT.flatten(1, 2)], dim=1)
    key = memory + encoding.memory(IMAGE_T_EGO)
    weights = routing_weights(query_pos, key, memory, cells).float()
    out = module.eval()(query_pos, key, memory, bias(weights, cells))
    parts = (bias, routing_weights, encoding, module)
    return out, [*leaves, *(parameter for part in parts for parameter in part.parameters())]


def test_a_reference_point_that_is_not_a_number_does_no_harm():
    reference = references()
    clean, _ = whole_step(reference.clone().requires_grad_())
    reference[0, 3] = NAN
    out, leaves = whole_step(reference.requires_grad_())
    assert out.isfinite().all() and torch.equal(out[:, 1], clean[:, 1])  # the other sample does not notice
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    learns = 3 + 1 + 19 + 8  # all but the decoder, whose first self-attention sees nothing
    shift = 3 + 1 + 6  # of the routing's keys, which a softmax does not see
    assert all(gradient.any() for place, gradient in enumerate(gradients[:learns]) if place != shift)
    assert not gradients[2][0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_under_autocast(dtype):
    reference = references().requires_grad_()
    expected, _ = whole_step(reference)
    with torch.autocast("cpu", dtype=dtype):
        out, leaves = whole_step(reference, dtype)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.float().sum(), leaves))


def test_repeats_are_equal_bit_for_bit():
    reference, grad = references(), torch.randn(2, 2, 7, 32)
    results = []
    for _ in range(2):
        out, leaves = whole_step(reference.clone().requires_grad_())
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


def test_no_queries():
    query_pos, key, value = inputs(queries=0, dtype=torch.float32)
    routing = routing_of(torch.zeros(2, 0, 2), references(2, 0))
    for out in (decoder()(query_pos, key, value), decoder()(query_pos, key, value, routing)):
        assert out.shape == (2, 2, 0, 32)
        out.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query_pos=torch.zeros(2, 7, 31)), ValueError, r"query_pos has shape \(2, 7, 31\), needs \(2, N, 32\)"),
        (dict(key=torch.zeros(3, 9, 32)), ValueError, r"key has shape \(3, 9, 32\), needs \(2, L, 32\)"),
        (dict(value=torch.zeros(2, 8, 32)), ValueError, r"value has shape \(2, 8, 32\), needs \(2, 9, 32\)"),
        (dict(self_mask=torch.ones(7, 6).bool()), ValueError, r"self_mask has shape \(7, 6\), needs \(7, 7\)"),
        (dict(self_mask=torch.ones(7, 7)), TypeError, "self_mask is float32, needs bool"),
    ],
)
def test_inputs_that_do_not_fit(change, error, message):
    arguments = dict(query_pos=torch.zeros(2, 7, 32), key=torch.zeros(2, 9, 32), value=torch.zeros(2, 9, 32))
    with pytest.raises(error, match=message):
        decoder()(**arguments | change)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="heads is 8, needs to divide the 32 channels into heads of 8 to 128"):
        QueryDecoder(32)
    with pytest.raises(ValueError, match="layers is 0, needs at least 1"):
        QueryDecoder(32, DecoderConfig(heads=2, layers=0))
