"""Images as tensors."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...modules.rig import ImageAugmentation


def load_image(path: str | Path) -> torch.Tensor:
    """(3, height, width) float32 RGB in [0, 1]."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def augment_image(image: torch.Tensor, augmentation: ImageAugmentation) -> torch.Tensor:
    """Does to an image (3, H, W) what `Camera.augmented` does to its camera. Outside the image is 0."""
    height, width = image.shape[-2:]
    resized_width, resized_height = augmentation.resized(width, height)
    if (resized_width, resized_height) != (width, height):
        size = (resized_height, resized_width)
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    if augmentation.crop is not None:
        left, top, crop_width, crop_height = augmentation.crop
        right, bottom = resized_width - left - crop_width, resized_height - top - crop_height
        image = F.pad(image, (-left, -right, -top, -bottom))
    if augmentation.flip:
        image = image.flip(-1)
    return _rotate(image, augmentation.rotation) if augmentation.rotation else image


def _rotate(image, degrees):
    height, width = image.shape[-2:]
    turn = ImageAugmentation(rotation=degrees).matrix(width, height)
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    source = (pixels @ torch.linalg.inv(turn).T)[..., :2]
    grid = (2 * source + 1) / torch.tensor([width, height]) - 1  # what grid_sample calls align_corners=False
    return F.grid_sample(image[None], grid[None].to(image), align_corners=False)[0]
