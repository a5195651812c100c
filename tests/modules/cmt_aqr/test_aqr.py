import math

import pytest
import torch
import torch.nn.functional as F

from rigfuse.kernels import TokenMap
from rigfuse.modules.cmt_aqr.aqr import (
    AQRConfig,
    AQRWeightGenerator,
    AttentionBiasGenerator,
    PointWeightGenerator,
    gather_local,
    token_maps,
)
from rigfuse.modules.maps_layout import MapLayout
from support.networks import with_noise

NAN = math.nan
LAYOUT = MapLayout((9, 7), (3, 8), cameras=2)


def bias_generator(**settings):
    return AttentionBiasGenerator(LAYOUT, AQRConfig(**settings))


def softmax_mass(query, key, bias):
    """Attention mass of every token, (B, N, heads, L): values are one-hot, so the mass is the output."""
    scores = torch.einsum("bihd,bjhd->bihj", query, key) * query.shape[-1] ** -0.5
    return (scores + bias[:, :, None]).softmax(-1)


def mass(weights, generator, centers, query, key):
    """The attention mass on each modality's maps, (B, N, heads, 2) of camera and LiDAR."""
    value = torch.zeros_like(key)
    bev = generator.maps[0].height * generator.maps[0].width
    value[:, bev:, :, 0], value[:, :bev, :, 1] = 1, 1
    with torch.no_grad():
        return generator(weights, centers).attend(query, key, value)[..., :2]


def small(dtype=torch.float64, **settings):
    """A rig of two maps of views beside a BEV map, and queries that are on all, one, and none of them."""
    generator = bias_generator(window_sizes=(4, 5), **settings).to(dtype)
    tokens = 9 * 7 + 2 * 3 * 8
    query, key = (torch.randn(1, n, 2, 16, dtype=dtype) for n in (3, tokens))
    centers = torch.tensor([[3.0, 4.2], [2.0, 1.0], [6.6, 0.0]]).repeat(3, 1, 1)
    centers[1, 1:], centers[2] = NAN, NAN
    return generator, centers[None], query, key


def test_weights_move_the_mass_between_the_modalities():
    generator, centers, query, key = small()
    steps = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for modality in (0, 1):
        weights = torch.zeros(9, 1, 3, 2, dtype=torch.float64)
        weights[..., modality] = steps[:, None, None]
        masses = torch.stack([mass(w, generator, centers, query, key) for w in weights])[:, 0]  # (9, 3, heads, 2)
        torch.testing.assert_close(masses.sum(-1), torch.ones(9, 3, 2, dtype=torch.float64))
        moved = masses[..., modality].diff(dim=0)
        on_a_map = [True, modality == 1, False]
        assert (moved[:, on_a_map] > 1e-3).all()
        assert (moved[:, [not on for on in on_a_map]].abs() < 1e-12).all()


def test_mass_is_the_softmax_with_the_bias():
    generator, centers, query, key = small()
    weights = torch.tensor([0.6, -0.8], dtype=torch.float64).expand(1, 3, 2)
    bias = torch.zeros(1, 3, 9 * 7 + 2 * 3 * 8, dtype=torch.float64)
    windows = ((0, 2, 7, (1, 6), (2, 7)), (63, 1, 8, (0, 4), (0, 3)), (87, 1, 8, (5, 8), (0, 2)))
    for m, (start, _, width, columns, rows) in enumerate(windows):
        for i in range(3 if m == 0 else 1):
            if i < 2:
                cells = [start + row * width + column for row in range(*rows) for column in range(*columns)]
                bias[0, i, cells] = 2.5 * (-0.8 if m == 0 else 0.6)
    expected = softmax_mass(query, key, bias)
    expected = torch.stack([expected[..., 63:].sum(-1), expected[..., :63].sum(-1)], dim=-1)
    torch.testing.assert_close(mass(weights, generator, centers, query, key), expected)


def test_without_locality_a_whole_modality_is_biased():
    generator, centers, query, key = small(use_local_bias=False)
    weights = torch.tensor([0.6, -0.8], dtype=torch.float64).expand(1, 3, 2)
    neutral, now = (mass(w, generator, centers, query, key) for w in (0 * weights, weights))
    odds = (now[..., 0] / now[..., 1]) / (neutral[..., 0] / neutral[..., 1])
    torch.testing.assert_close(odds, torch.full_like(odds, math.exp(2.5 * 1.4)))


def test_the_routing_carries_the_limits():
    generator = bias_generator(max_scale=3.0, min_scale=1.0)
    routing = generator(torch.tensor([[[0.25, -0.5]]]), torch.zeros(1, 1, 3, 2))
    assert (routing.min_scale, routing.max_scale) == (1.0, 3.0)
    assert routing.weights.tolist() == [[[-0.5, 0.25, 0.25]]]
    assert routing.bias_scale is generator.bias_scale and routing.bias_scale.item() == 2.5
    assert routing.maps == (TokenMap(9, 7, 5), TokenMap(3, 8, 8), TokenMap(3, 8, 8))


def test_a_fixed_scale_is_a_buffer_of_the_same_name():
    learnable, fixed = bias_generator(), bias_generator(bias_scale=3.0, learnable_scale=False)
    assert [name for name, _ in learnable.named_parameters()] == ["bias_scale"] and not list(fixed.parameters())
    fixed.load_state_dict(learnable.state_dict())
    assert fixed.bias_scale.item() == 2.5


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(window_sizes=(8, 0)), r"window_sizes is \(8, 0\), needs two sides"),
        (dict(window_sizes=(8,)), r"window_sizes is \(8,\), needs two sides"),
        (dict(bias_scale=6.0), r"bias_scale is 6.0, needs 0 ≤ min_scale \(0.5\) ≤ bias_scale ≤ max_scale \(5.0\)"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        bias_generator(**settings)


def sampled(maps, centers):
    """Independent: grid_sample. maps (S, C, H, W), centers (S, N, 2) → (S, N, C)."""
    size = torch.tensor([maps.shape[-1], maps.shape[-2]])
    grid = ((centers.to(maps.dtype) + 0.5) * 2 / size - 1)[:, None]
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0].mT


def local_inputs():
    bev = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    images = torch.randn(2, 2, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[7, 9], [8, 3], [8, 3]])
    centers = torch.rand(2, 11, 3, 2) * sizes - 0.5
    centers[0, :3, 1], centers[0, 2:5, 2], centers[1, 5:, 0] = NAN, NAN, NAN
    return bev, images, centers


def test_what_the_maps_hold_at_a_query():
    bev, images, centers = local_inputs()
    local, seen = gather_local(bev, images, centers)
    there = centers.isfinite().all(-1)
    clean = centers.nan_to_num(0.0)
    views = (
        torch.stack([sampled(images[:, v], clean[:, :, 1 + v]) for v in (0, 1)])
        * there[:, :, 1:].permute(2, 0, 1)[..., None]
    )
    views = views.sum(0) / there[:, :, 1:].sum(-1, keepdim=True).clamp(min=1)
    expected = torch.stack([views, sampled(bev, clean[:, :, 0]) * there[:, :, :1]], dim=2)
    torch.testing.assert_close(local, expected, rtol=0, atol=1e-6)  # the centres are float32
    assert torch.equal(seen, torch.stack([there[:, :, 1:].any(-1), there[:, :, 0]], dim=-1))
    assert not local[~seen].any() and (~seen).any(1).any()
    grad = torch.randn_like(local)
    gradients = [torch.autograd.grad(out, (bev, images), grad) for out in (local, expected)]
    for actual, exact in zip(*gradients):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-5)


def test_no_query_gathers_nothing():
    bev, images, centers = local_inputs()
    local, seen = gather_local(bev, images, centers[:, :0])
    assert local.shape == (2, 0, 2, 4) and seen.shape == (2, 0, 2)


def test_centers_that_do_not_fit():
    bev, images, centers = local_inputs()
    with pytest.raises(ValueError, match=r"cells has shape \(2, 11, 2, 2\), needs \(2, N, 3, 2\)"):
        gather_local(bev, images, centers[:, :, :2])


@pytest.mark.parametrize("evidence", ["window", "point"])
def test_weights_start_at_zero_and_learn(evidence):
    if evidence == "point":
        generator = PointWeightGenerator(32, hidden=8)
        inputs = torch.randn(2, 5, 32), torch.randn(2, 5, 2, 32), torch.rand(2, 5, 2) > 0.5
    else:
        generator, inputs = AQRWeightGenerator(32, token_maps(LAYOUT, (3, 3)), heads=2, feedforward=8), seeing(32)
    assert not generator(*inputs).any()
    optimizer = torch.optim.SGD(generator.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (generator(*inputs) - torch.tensor([0.5, -0.5])).square().mean()
        loss.backward()
        optimizer.step()
    idle = {"key.bias"}  # a softmax sees no shift
    learning = [parameter for name, parameter in generator.named_parameters() if name not in idle]
    assert loss < 0.05 and all(parameter.grad.any() for parameter in learning)


def seeing(channels):
    """Queries of two samples, keys and values, and the queries' cells: one is on all maps, 2 on a camera's alone, 3 on
    none, 4 on the BEV map alone."""
    tokens = 9 * 7 + 2 * 3 * 8
    cells = torch.rand(2, 5, 3, 2) * torch.tensor([[7, 9], [8, 3], [8, 3]]) - 0.5
    cells[:, 1:, 2], cells[:, 2, 0], cells[:, 3], cells[:, 4, 1] = NAN, NAN, NAN, NAN
    return torch.randn(2, 5, channels), torch.randn(2, tokens, channels), torch.randn(2, tokens, channels), cells


def test_the_evidence_is_what_lies_in_the_windows():
    generator = with_noise(AQRWeightGenerator(32, token_maps(LAYOUT, (3, 5)), heads=2, feedforward=16))
    query, key, value, cells = seeing(32)
    weights = generator(query, key, value, cells)
    assert weights.abs().max() <= 1 and weights.shape == (2, 5, 2)
    for place in range(5):
        inside = torch.zeros(2, 9 * 7 + 2 * 3 * 8, dtype=torch.bool)
        first = 0
        for m, (height, width, window) in enumerate(generator.maps):
            x, y = (cells[:, place, m, axis, None, None] for axis in (0, 1))
            left, top = ((c + 0.5).floor() - window // 2 for c in (x, y))
            rows, columns = torch.arange(height)[:, None], torch.arange(width)
            there = (rows >= top) & (rows < top + window) & (columns >= left) & (columns < left + window)
            inside[:, first : first + height * width] = there.flatten(1)
            first += height * width
        assert inside.any(1).all() == (place != 3)
        outside_changed = (torch.where(inside[..., None], x, x + 1e3) for x in (key, value))
        torch.testing.assert_close(generator(query, *outside_changed, cells)[:, place], weights[:, place])
        for changed in ((-key, value), (key, -value)) if place != 3 else ():
            changed = (torch.where(inside[..., None], x, y) for x, y in zip(changed, (key, value)))
            assert ((generator(query, *changed, cells) - weights)[:, place].abs().amax(-1) > 1e-4).all()


def test_the_evidence_knows_which_modality_it_reads():
    """The same tokens everywhere: only the vectors of the modalities tell the maps apart."""
    generator = with_noise(AQRWeightGenerator(32, token_maps(LAYOUT, (3, 3)), heads=2, feedforward=16))
    query, key, value, cells = seeing(32)
    query, key, value = (x[:1, :1].expand(x.shape) for x in (query, key, value))
    weights = generator(query, key, value, cells)[0]
    lidar_alone, camera_alone = weights[4], weights[2]
    assert (lidar_alone - camera_alone).abs().min() > 1e-4


def test_weights_know_what_is_seen_and_only_that():
    generator = with_noise(PointWeightGenerator(16, hidden=8))
    query, local = torch.randn(1, 4, 16), torch.randn(1, 4, 2, 16)
    seen = torch.tensor([[[1, 1], [1, 0], [0, 1], [0, 0]]], dtype=torch.bool)
    weights = generator(query, local, seen)
    changed = torch.where(seen[..., None], local, NAN)
    assert torch.equal(generator(query, changed, seen), weights)
    assert not torch.isclose(generator(query, local, ~seen), weights).any()
    extreme = generator(query * 1e6, local * 1e6, seen)
    assert extreme.abs().max() <= 1 and extreme.isfinite().all()
