"""The fast plain PyTorch backend: fused interpolations, in float32 or wider."""

import torch

from ..runtime.launch import accumulator_dtype


def forward(original, completed, gate_logits, fine=None, importance=None, missing=None):
    if missing is not None:
        # What is proposed for an image that is present may be NaN: neither its value nor its gradient may get through.
        present = ~missing[:, None, None, None]
        inputs = (original, completed, gate_logits, fine, importance)
        fused = forward(*(t if t is None else t.masked_fill(present, 0) for t in inputs))
        return torch.where(present, original, fused)

    floats = [t for t in (original, completed, gate_logits, fine, importance) if t is not None]
    dtype = accumulator_dtype(*(t.dtype for t in floats))
    proposal = completed.to(dtype)
    if fine is not None:
        proposal = torch.lerp(proposal, fine.to(dtype), importance.to(dtype))
    return torch.lerp(original.to(dtype), proposal, torch.sigmoid(gate_logits.to(dtype))).to(original.dtype)
