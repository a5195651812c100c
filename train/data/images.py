"""Images of cameras, as tensors."""

import numpy as np
import torch
from PIL import Image

from ...modules.rig import ImageAugmentation
from .files import BadFile, read_picture
from .moments import Moment
from .painted import paint

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which backbones' weights are trained on


def camera_image(moment: Moment, name: str, augmentation: ImageAugmentation) -> torch.Tensor:
    """What a camera shows, augmented: (3, height, width) uint8. A drive without files is painted straight at that size.

    A file of another size than its camera, but of the same shape, gives the same view: it is scaled to what the camera
    needs, once.

    Raises:
        BadFile: there is no file, or it is broken or of another shape; see `read_picture`.
    """
    if not moment.images:
        return paint(moment.rig[name].augmented(augmentation), moment.world_T_ego)
    camera = moment.rig[name]
    if name not in moment.images:
        raise BadFile(f"{name} of {moment.token}")
    size = camera.width, camera.height
    width, height = augmentation.resized(*size)
    picture = read_picture(moment.images[name], size, draft=(2 * width, 2 * height))
    pixels = np.array(augment_image(picture, augmentation, size))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Bytes (..., 3, H, W) as a backbone takes them: float32 with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) * 255 for values in (_MEAN, _STD))
    return images.float().sub_(mean).div_(std)


def as_picture(image: torch.Tensor) -> torch.Tensor:
    """What `normalised` made of bytes, as bytes again: (..., 3, H, W) uint8 on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (_MEAN, _STD))
    return (image.float().cpu() * std + mean).round_().clamp_(0, 255).byte()


def augment_image(
    image: Image.Image, augmentation: ImageAugmentation, size: tuple[int, int] | None = None
) -> Image.Image:
    """Does to an RGB image what `Camera.augmented` does to its camera. Outside the image is black.

    Args:
        image: of the camera's size, or a scaled version of such a one.
        augmentation: in pixels of the camera.
        size: (width, height) of the camera's images; None = the image's.
    """
    resized = augmentation.resized(*(size or image.size))
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
