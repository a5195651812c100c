"""Stage 2: a variational autoencoder of each scale's features, for what stage 1 leaves empty."""

from dataclasses import dataclass

import torch
from torch import nn

from ..maps import replace_maps, wanted_maps
from ..rig import NUSCENES_CAMERAS
from ..settings import Count
from .usual import UsualMaps


@dataclass
class VAEConfig:
    """Settings of stage 2."""

    enable: bool = True  # False leaves the stage out of the cascade
    latent: Count = 64  # channels of the latent maps
    at_inference: bool = True  # fills what stage 1 leaves empty there too; the documents use it in training alone
    grid: tuple[Count, Count] = (28, 50)  # cells (height, width) of what each camera usually sees


class ScaleVAE(nn.Module):
    """Convolutional VAE (Kingma & Welling 2014) of one scale's maps, 4 times smaller per side in the middle.

    A missing camera has the latents that the present ones suggest: their mean, in the terms of that camera.
    """

    def __init__(self, channels: int, latent: int, cameras: int):
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
        self.suggest = nn.Parameter(torch.randn(cameras, latent, latent) / latent**0.5)

    def encode(self, maps: torch.Tensor, missing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu and logvar (B, V, latent, ⌈H/4⌉, ⌈W/4⌉) of maps (B, V, C, H, W), zeros where `missing` (B, V) bool."""
        mu, logvar = self.encoder(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).chunk(2, dim=2)
        present = (~missing).to(mu)
        mean = torch.einsum("bv,bvc->bc", present, mu.mean(dim=(-2, -1)))
        mean = mean / present.sum(dim=1, keepdim=True).clamp(min=1)
        suggested = torch.einsum("bc,vcd->bvd", mean, self.suggest.to(mean.dtype))[..., None, None]
        return torch.where(missing[:, :, None, None, None], suggested, mu), logvar

    def decode(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Maps (N, C, *size) of latents (N, latent, h, w)."""
        return self.decoder(z)[..., : size[0], : size[1]]


class PVReconVAE(nn.Module):
    """Reconstructs perspective-view features, each scale on its own (design documents' `PVReconVAE`).

    What each camera usually shows in a cell, its running mean, is taken off before the encoder and added after the
    decoder. Of a missing camera nothing is encoded: it is decoded from what the present ones suggest. So where those
    say nothing the usual is filled in.

    Args:
        scales: number of scales.
        channels: C of every scale.
        config: see `VAEConfig`; None = its defaults.
        cameras: V.
    """

    def __init__(
        self, scales: int, channels: int, config: VAEConfig | None = None, *, cameras: int = len(NUSCENES_CAMERAS)
    ):
        super().__init__()
        config = config or VAEConfig()
        self.usual = UsualMaps(scales, cameras, channels, config.grid)
        self.scales = nn.ModuleList(ScaleVAE(channels, config.latent, cameras) for _ in range(scales))

    def forward(
        self,
        features: list[torch.Tensor],
        missing: torch.Tensor,
        replace: list[torch.Tensor],
        target: list[torch.Tensor] | None = None,
        *,
        every: bool = False,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Replaces maps of missing cameras by what is made of the present ones.

        Args:
            features: for each scale (B, V, C, H, W); get gradients, those of missing cameras none.
            missing: (B, V) bool.
            replace: for each scale (B, V) bool, the missing maps to replace; all others return bit for bit.
            target: the teacher's features, like `features`; None = no losses.
            every: decodes the maps of every camera, so that no shape hangs on a value.

        Returns:
            the features, and the losses `vae_rec` (mean squared error to the target, relative to the target's mean
            square: scales and backbones differ in size; half of it is that of the missing cameras) and `vae_kl`
            (divergence from the unit normal per latent element), means over the scales.
        """
        if self.training:
            self.usual.learn(features, missing)
        if target is None and not every and not any(here.any() for here in replace):
            return features, {}
        results, losses = [], []
        for scale, (x, here) in enumerate(zip(features, replace)):
            usual = self.usual.at(scale, slice(None), x)
            unusual = (x - usual).masked_fill(missing[:, :, None, None, None], 0)
            mu, logvar = self.scales[scale].encode(unusual, missing)
            if target is None:
                index = wanted_maps(here, every)
                rebuilt = self._decode(scale, mu, usual, index)
                results.append(replace_maps(x, index, lambda _, maps=rebuilt: maps, only=here if every else None))
                continue
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            rebuilt = self._decode(scale, z, usual, wanted_maps(missing, every=True)).unflatten(0, x.shape[:2])
            results.append(torch.where(here[:, :, None, None, None], rebuilt.to(x.dtype), x))
            losses.append((_reconstruction(rebuilt, target[scale], missing), _divergence(mu.float(), logvar.float())))
        if target is None:
            return results, {}
        reconstruction, divergence = (torch.stack(terms).mean() for terms in zip(*losses))
        return results, dict(vae_rec=reconstruction, vae_kl=divergence)

    def _decode(self, scale, z, usual, index):
        """The maps at an index, sample and camera (N,) each, from the latents of all."""
        decoded = self.scales[scale].decode(z[index], tuple(usual.shape[-2:]))
        return decoded + usual[index[1]]


def _reconstruction(rebuilt, true, missing):
    """The error of present and of missing maps, one half each where there are both."""
    true = true.float()
    error = (rebuilt.float() - true).square().mean(dim=(2, 3, 4))  # (B, V)
    means = [error[of].mean() for of in (missing, ~missing) if of.any()]
    return torch.stack(means).mean() / true.square().mean().clamp(min=1e-6)


def _divergence(mu, logvar):
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
