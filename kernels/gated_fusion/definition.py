"""The mathematics, as it is written down."""

import torch


def forward(original, completed, gate_logits, fine, importance, missing):
    if missing is not None:
        # An image that is present takes no part, whatever is proposed for it, NaN included.
        present = ~missing[:, None, None, None]
        inputs = (original, completed, gate_logits, fine, importance)
        fused = forward(*(t if t is None else t.masked_fill(present, 0) for t in inputs), None)
        return torch.where(present, original, fused)

    proposal = completed
    if fine is not None:
        proposal = completed * (1 - importance) + fine * importance
    gate = torch.sigmoid(gate_logits)
    return (original * (1 - gate) + proposal * gate).to(original.dtype)
