"""The mathematics, as it is written down."""

import torch


def forward(scores, bias, bias_scale, min_scale, max_scale, max_bias):
    bias_scale = bias_scale.clamp(min_scale, max_scale)
    absent = bias == -torch.inf  # moves nothing, where autograd would make NaN of 0 · −inf
    scaled = torch.where(absent, (bias_scale * bias).detach(), bias_scale * bias.masked_fill(absent, 0))
    logits = scores + scaled.clamp(-max_bias, max_bias)
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    probabilities = logits.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    return probabilities.to(scores.dtype).contiguous()
