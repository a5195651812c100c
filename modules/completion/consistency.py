"""The losses of completion: completed features against the teacher's."""

import torch
import torch.nn.functional as F


def consistency_losses(
    features: list[torch.Tensor],
    teacher: list[torch.Tensor],
    missing: torch.Tensor,
    importance: list[torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Measures how far the missing cameras' features are from the teacher's; zero (with gradient) when none is missing.

    `ssl`: squared error relative to the teacher's mean square, plus one minus the cosine of each cell, mean over the
    scales. `planning_guided`: the same relative error weighted by the trajectory's importance; present with one.
    """
    ssl, guided = [], []
    for scale, (x, target) in enumerate(zip(features, teacher)):
        x, target = x[missing].float(), target[missing].float()  # (Nq, C, H, W)
        if len(x) == 0:
            ssl.append(features[scale].sum() * 0)
            continue
        error = (x - target).square().mean(dim=1) / target.square().mean().clamp(min=1e-6)
        ssl.append(error.mean() + (1 - F.cosine_similarity(x, target, dim=1)).mean())
        if importance is not None:
            weight = importance[scale][missing]
            guided.append((error * weight).sum() / weight.sum().clamp(min=1.0))
    losses = dict(ssl=torch.stack(ssl).mean())
    if guided:
        losses["planning_guided"] = torch.stack(guided).mean()
    return losses
