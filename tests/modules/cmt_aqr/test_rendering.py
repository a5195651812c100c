import math

import pytest
import torch

from rigfuse.kernels import TokenMap, window_bias_attention
from rigfuse.modules.cmt_aqr.aqr import modulate, render_weights

NAN, INF = math.nan, math.inf
MAPS = (TokenMap(9, 7, 5), TokenMap(3, 8, 4), TokenMap(3, 8, 4))


def hostile_centers(batch=2, queries=11):
    sizes = torch.tensor([[width, height] for height, width, _ in MAPS])
    centers = torch.rand(batch, queries, 3, 2) * (sizes + 6) - 3
    odd = [(NAN, NAN), (NAN, 1.0), (INF, 2.0), (-0.5, -0.5), (2.5, 2.5)]
    centers[:, : len(odd)] = torch.tensor(odd)[:, None]
    centers[:, 8:, 0] = NAN
    return centers


def rendered_by_walking(weights, centers):
    """The op's rule, window by window: a mean that is a list, in Python."""
    rows = []
    for b in range(len(weights)):
        row = []
        for m, (height, width, window) in enumerate(MAPS):
            covering = [[] for _ in range(height * width)]
            for i, (x, y) in enumerate(centers[b, :, m].tolist()):
                if math.isfinite(x) and math.isfinite(y):
                    left, top = (math.floor(c + 0.5) - window // 2 for c in (x, y))
                    for v in range(max(top, 0), min(top + window, height)):
                        for u in range(max(left, 0), min(left + window, width)):
                            covering[v * width + u].append(weights[b, i, m])
            row += [torch.stack(found).mean() if found else weights.new_ones(()) for found in covering]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_rendered_weights_are_the_mean_of_the_covering_queries():
    centers = hostile_centers()
    weights = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    actual, expected = render_weights(weights, centers, MAPS), rendered_by_walking(weights, centers)
    torch.testing.assert_close(actual, expected)
    assert (expected == 1).any() and (expected != 1).sum() > 100
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, weights, grad)[0] for out in (actual, expected)))


def test_windows_are_those_of_the_attention():
    """With values that name the token, and no query or key, a token in the window gets more than its share."""
    centers = hostile_centers(1, 40)
    tokens = sum(height * width for height, width, _ in MAPS)
    query, key, value = torch.zeros(1, 40, 1, 128), torch.zeros(1, tokens, 1, 128), torch.eye(128)[None, :tokens, None]
    out = window_bias_attention(query, key, value, centers, torch.ones(1, 40, 3), torch.tensor(2.5), maps=MAPS)[0, :, 0]
    for i in range(40):
        rendered = render_weights(torch.full((1, 1, 3), 0.5), centers[:, i : i + 1], MAPS)[0]
        outside, inside = out[i, :tokens][rendered == 1], out[i, :tokens][rendered == 0.5]
        assert len(outside) + len(inside) == tokens and (not len(inside) or inside.min() > 2 * outside.max())


def test_rendering_without_queries_and_under_autocast():
    assert torch.equal(render_weights(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3, 2), MAPS), torch.ones(2, 111))
    weights, centers = torch.randn(2, 11, 3), hostile_centers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rendered = render_weights(weights, centers, MAPS)
    assert torch.equal(rendered, render_weights(weights, centers, MAPS)) and rendered.dtype == torch.float32


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weights has shape \(1, 4, 2\) and cells \(1, 4, 2, 2\), need \(B, N, 3\)"):
        render_weights(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2, 2), MAPS)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 4, 3\) and cells \(1, 5, 3, 2\), need"):
        render_weights(torch.zeros(1, 4, 3), torch.zeros(1, 5, 3, 2), MAPS)


def test_modulation():
    tokens, rendered = torch.randn(2, 5, 4), torch.rand(2, 5) * 2
    torch.testing.assert_close(modulate(tokens, rendered, "v1"), tokens * rendered[..., None])
    torch.testing.assert_close(modulate(tokens, rendered, "v2"), tokens + tokens * (rendered[..., None] - 1) * 0.1)
    assert all(torch.equal(modulate(tokens, torch.ones(2, 5), generation), tokens) for generation in ("v1", "v2"))
    with pytest.raises(ValueError, match="generation is 'v3', needs 'v1' or 'v2'"):
        modulate(tokens, rendered, "v3")
