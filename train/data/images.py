"""Images from files, as tensors."""

import numpy as np
import torch
from PIL import Image

from ...modules.rig import ImageAugmentation
from .moments import Moment
from .painted import paint

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which backbones' weights are trained on


class BadFile(Exception):
    """Its argument is the file that is missing or cannot be read."""


def camera_image(moment: Moment, name: str, augmentation: ImageAugmentation) -> torch.Tensor:
    """What a camera shows, augmented: (3, height, width) uint8. A drive without files is painted straight at that size.

    Raises:
        BadFile: the file is missing or broken, or has another size than its camera.
    """
    if not moment.images:
        return paint(moment.rig[name].augmented(augmentation), moment.world_T_ego)
    camera, path = moment.rig[name], moment.images.get(name, f"{name} of {moment.token}")
    try:
        with Image.open(path) as image:
            if image.size != (camera.width, camera.height):
                raise BadFile(str(path))
            pixels = np.array(augment_image(image, augmentation))
    except (OSError, SyntaxError, ValueError) as error:  # missing, or what PIL raises for broken files
        raise BadFile(str(path)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Bytes (..., 3, H, W) as a backbone takes them: float32 with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) * 255 for values in (_MEAN, _STD))
    return images.float().sub_(mean).div_(std)


def augment_image(image: Image.Image, augmentation: ImageAugmentation) -> Image.Image:
    """Does to an image what `Camera.augmented` does to its camera. RGB; outside the image is black."""
    resized = augmentation.resized(*image.size)
    image.draft("RGB", (2 * resized[0], 2 * resized[1]))  # a much larger JPEG is decoded at a part of its size
    image = image.convert("RGB")
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    if augmentation.crop is not None:
        left, top, width, height = augmentation.crop
        image = image.crop((left, top, left + width, top + height))
    if augmentation.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _rotate(image, augmentation.rotation) if augmentation.rotation else image


def _rotate(image, degrees):
    turn = ImageAugmentation(rotation=degrees).matrix(*image.size).numpy()
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # PIL counts from the corner of the first pixel
    inverse = half @ np.linalg.inv(turn) @ np.linalg.inv(half)
    return image.transform(image.size, Image.Transform.AFFINE, inverse[:2].ravel(), Image.Resampling.BILINEAR)
