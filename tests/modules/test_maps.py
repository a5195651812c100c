import torch

from rigfuse.modules.maps import replace_maps


def test_equals_indexing_and_index_put_and_keeps_the_memory_format():
    features = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    features = (
        features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3)).requires_grad_()
    )
    index = torch.tensor([0, 1]), torch.tensor([2, 0])
    weight, grad = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    function = lambda maps: (maps * weight).sin()  # noqa: E731

    replaced = replace_maps(features, index, function)
    expected = features.index_put(index, function(features[index]))
    assert torch.equal(replaced, expected) and replaced.stride() == features.stride()
    kept = grad.clone()
    (got,), (want,) = (torch.autograd.grad(out, features, grad) for out in (replaced, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(grad, kept)
    assert torch.autograd.gradcheck(lambda x: replace_maps(x, index, function), features)
