"""One representative call of every operation, for the checks that are the same for all of them."""

import torch

from rigfuse.kernels import (
    TokenMap,
    bev_warp,
    bias_softmax,
    cross_camera_attention,
    gated_fusion,
    multi_depth_warp,
    trajectory_importance,
    window_bias_attention,
)


def _images(*shape, dtype, device):
    return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()


def _projection(count, device):
    """A camera that moved and turned a little, and looks at cells of a 28 × 50 map."""
    projection = torch.eye(3, 4).repeat(count, 1, 1) + 0.02 * torch.randn(count, 3, 4)
    projection[:, 2, :2] *= 1e-3
    return projection.to(device)


def warp_case(device, dtype):
    features = _images(4, 96, 28, 50, dtype=dtype, device=device)
    weights = torch.rand(6, 2, 28, 50, device=device).requires_grad_()
    offsets = torch.randn(6, 2, 28, 50, 2, device=device).requires_grad_()
    index = torch.tensor([0, 0, 1, 3, 3, 2], device=device)
    geometry = (_projection(6, device), torch.tensor([10.0, 30.0], device=device))

    def call(features, weights, offsets):
        return multi_depth_warp(features, *geometry, weights=weights, offsets=offsets, source_index=index)[0]

    return call, (features, weights, offsets)


def bev_case(device, dtype):
    transform = torch.tensor([[0.99, 0.1, 1.5], [-0.1, 0.99, -2.25]], device=device).repeat(3, 1, 1)
    return lambda features: bev_warp(features, transform)[0], (_images(3, 64, 56, 104, dtype=dtype, device=device),)


def attention_case(device, dtype):
    tokens = lambda *shape: torch.randn(shape, dtype=dtype, device=device).requires_grad_()  # noqa: E731
    table = torch.tensor([[0, 3, 5, -1], [2, 2, 4, 1], [-1, -1, -1, -1]], device=device)
    mask = torch.rand(7, 91, device=device) > 0.1
    call = lambda q, k, v: cross_camera_attention(q, k, v, table, key_mask=mask)  # noqa: E731
    return call, (tokens(3, 300, 4, 32), tokens(7, 91, 4, 32), tokens(7, 91, 4, 32))


def fusion_case(device, dtype):
    image = lambda channels: _images(4, channels, 28, 50, dtype=dtype, device=device)  # noqa: E731
    missing = torch.tensor([True, False, True, True], device=device)
    call = lambda o, c, g, f, i: gated_fusion(o, c, g, fine=f, importance=i, missing=missing)  # noqa: E731
    return call, (image(96), image(96), image(1), image(96), image(1))


def trajectory_case(device, dtype):
    points, valid = torch.rand(6, 12, 2, device=device) * 50, torch.rand(6, 12, device=device) > 0.2
    gain = torch.ones((), device=device, requires_grad=True)
    return lambda gain: gain * trajectory_importance(points, valid, (28, 50), sigma=3.0), (gain,)


def window_case(device, dtype):
    maps = (TokenMap(32, 32, 5), TokenMap(10, 25, 8))
    tokens = lambda length: torch.randn(2, length, 4, 32, dtype=dtype, device=device).requires_grad_()  # noqa: E731
    centers = torch.rand(2, 200, 2, 2, device=device) * 30 - 2
    weights = torch.rand(2, 200, 2, device=device).mul(2).sub(1).requires_grad_()
    scale = torch.tensor(2.5, device=device, requires_grad=True)
    length = sum(m.height * m.width for m in maps)
    call = lambda q, k, v, w, s: window_bias_attention(q, k, v, centers, w, s, maps=maps)  # noqa: E731
    return call, (tokens(200), tokens(length), tokens(length), weights, scale)


def softmax_case(device, dtype):
    scores = torch.randn(2, 4, 50, 300, dtype=dtype, device=device).requires_grad_()
    bias = torch.randn(2, 1, 50, 300, dtype=dtype, device=device).requires_grad_()
    scale = torch.tensor(1.5, device=device, requires_grad=True)
    limits = dict(min_scale=0.5, max_scale=5.0, max_bias=2.0)
    return lambda x, b, s: bias_softmax(x, b, s, **limits), (scores, bias, scale)


OPERATIONS = {
    "multi_depth_warp": warp_case,
    "bev_warp": bev_case,
    "cross_camera_attention": attention_case,
    "gated_fusion": fusion_case,
    "trajectory_importance": trajectory_case,
    "window_bias_attention": window_case,
    "bias_softmax": softmax_case,
}


def forward_and_gradients(call, inputs, grad=None):
    """The output and the gradients of all inputs, against a fixed pseudo-random gradient."""
    out = call(*inputs)
    if grad is None:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
