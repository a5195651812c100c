"""The fast plain PyTorch backend, its gradients written by hand: probabilities alone are saved, in their own dtype."""

import torch

from ..runtime.launch import accumulator_dtype


def forward(scores, bias, bias_scale, min_scale, max_scale, max_bias):
    dtype = accumulator_dtype(scores.dtype)
    scaled = bias_scale.to(dtype).clamp(min_scale, max_scale) * bias.to(dtype)
    logits = scores.to(dtype) + scaled.clamp(-max_bias, max_bias)
    if logits.numel():
        empty = logits.amax(-1, keepdim=True) == -torch.inf
        logits = logits.masked_fill_(empty, 0).softmax(-1).masked_fill_(empty, 0)
    return logits.to(scores.dtype).contiguous()


def backward(grad, probabilities, bias, bias_scale, min_scale, max_scale, max_bias, needs_grad):
    dtype = accumulator_dtype(probabilities.dtype)
    p = probabilities.to(dtype)
    dscores = p * grad
    dscores -= p * dscores.sum(-1, keepdim=True)
    wide, s = bias.to(dtype), bias_scale.to(dtype).clamp(min_scale, max_scale)
    computed = [dscores.to(probabilities.dtype).contiguous()]
    if any(needs_grad[1:]):
        dbias = dscores.sum_to_size(bias.shape)
        dbias = torch.where((s * wide).abs() <= max_bias, dbias, 0)
        within = (bias_scale >= min_scale) & (bias_scale <= max_scale)
        # A bias of −inf moves nothing; 0 · −inf would say NaN.
        dscale = torch.where(within, torch.where(dbias == 0, 0, dbias * wide).sum(), 0)
        computed += [(dbias * s).to(bias.dtype), dscale.to(bias_scale.dtype)]
    else:
        computed += [None, None]
    return computed
