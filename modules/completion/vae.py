"""Stage 2: a variational autoencoder of each scale's features, the fallback where there is no history."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..settings import Count


@dataclass
class VAEConfig:
    """Settings of stage 2."""

    enable: bool = True  # False leaves the stage out of the cascade
    latent: Count = 64  # channels of the latent maps
    at_inference: bool = False  # fills what has no history there too; the documents use it in training alone


class ScaleVAE(nn.Module):
    """Convolutional VAE (Kingma & Welling 2014) of one scale's maps, 4 times smaller per side in the middle."""

    def __init__(self, channels: int, latent: int):
        super().__init__()
        hidden = max(channels // 2, latent)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, 2 * latent, 3, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent, hidden, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1),
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstructs maps (N, C, H, W); returns them, mu and logvar (N, latent, ⌈H/4⌉, ⌈W/4⌉)."""
        mu, logvar = self.encoder(features).chunk(2, dim=1)
        z = mu
        if self.training:
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        height, width = features.shape[-2:]
        return self.decoder(z)[..., :height, :width], mu, logvar


class PVReconVAE(nn.Module):
    """Reconstructs perspective-view features, each scale on its own (design documents' `PVReconVAE`).

    Args:
        scales: number of scales.
        channels: C of every scale.
        config: see `VAEConfig`; None = its defaults.
    """

    def __init__(self, scales: int, channels: int, config: VAEConfig | None = None):
        super().__init__()
        latent = (config or VAEConfig()).latent
        self.scales = nn.ModuleList(ScaleVAE(channels, latent) for _ in range(scales))

    def forward(
        self, features: list[torch.Tensor], replace: torch.Tensor, target: list[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Replaces maps by their reconstruction.

        Args:
            features: for each scale (B, V, C, H, W); get gradients.
            replace: (B, V) bool, the maps to replace; the others return bit for bit.
            target: the teacher's features, like `features`; None = no losses.

        Returns:
            the features, and the losses `vae_rec` (mean squared error to the target over all maps, relative to the
            target's mean square: scales and backbones differ in size) and `vae_kl` (divergence from the unit normal per
            latent element), means over the scales.
        """
        results, reconstruction, divergence = [], [], []
        for scale, (vae, x) in enumerate(zip(self.scales, features)):
            rebuilt, mu, logvar = vae(x.flatten(0, 1))
            rebuilt = rebuilt.unflatten(0, x.shape[:2]).to(x.dtype)
            results.append(torch.where(replace[:, :, None, None, None], rebuilt, x))
            if target is not None:
                true = target[scale].float()
                reconstruction.append(F.mse_loss(rebuilt.float(), true) / true.square().mean().clamp(min=1e-6))
                mu, logvar = mu.float(), logvar.float()
                divergence.append(0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean())
        if target is None:
            return results, {}
        return results, dict(vae_rec=torch.stack(reconstruction).mean(), vae_kl=torch.stack(divergence).mean())
