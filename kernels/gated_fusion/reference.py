"""The mathematics in plain PyTorch: any float dtype, any device, differentiated by autograd."""

import torch

from .._runtime.launch import accumulator_dtype


def gated_fusion(original, completed, gate_logits, fine=None, importance=None, missing=None):
    floats = [t for t in (original, completed, gate_logits, fine, importance) if t is not None]
    dtype = accumulator_dtype(*(t.dtype for t in floats))
    proposal = completed.to(dtype)
    if fine is not None:
        proposal = torch.lerp(proposal, fine.to(dtype), importance.to(dtype))
    fused = torch.lerp(original.to(dtype), proposal, torch.sigmoid(gate_logits.to(dtype))).to(original.dtype)
    if missing is None:
        return fused
    return torch.where(missing[:, None, None, None], fused, original)
