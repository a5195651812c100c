"""Images are moved as `ImageAugmentation.matrix` says."""

import pytest
import torch
from PIL import Image

from rigfuse.modules.rig import ImageAugmentation
from rigfuse.train.data.images import augment_image, load_image

AUGMENTATIONS = [
    ImageAugmentation(),
    ImageAugmentation(resize=0.44),
    ImageAugmentation(resize=1.3),
    ImageAugmentation(resize=0.61, crop=(-9, 12, 90, 60)),
    ImageAugmentation(crop=(20, 10, 101, 81), flip=True),
    ImageAugmentation(rotation=11.0),
    ImageAugmentation(resize=0.8, crop=(3, 5, 110, 77), flip=True, rotation=-7.5),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
@pytest.mark.parametrize("spot", [(83.3, 61.6), (61.0, 48.5)])
def test_a_spot_lands_where_the_matrix_says(augmentation, spot):
    v, u = torch.meshgrid(torch.arange(121.0), torch.arange(160.0), indexing="ij")
    image = torch.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / (2 * 3.0**2)).expand(3, 121, 160)
    augmented = augment_image(image, augmentation)[0]
    assert augmented.T.shape == augmentation.size(160, 121)
    v, u = torch.meshgrid(*(torch.arange(float(n)) for n in augmented.shape), indexing="ij")
    found = torch.stack([(u * augmented).sum(), (v * augmented).sum()]) / augmented.sum()
    expected = augmentation.matrix(160, 121) @ torch.tensor([*spot, 1], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected[:2], rtol=0, atol=0.02)


def test_outside_the_image_is_black():
    augmented = augment_image(torch.ones(3, 4, 6), ImageAugmentation(crop=(-2, -1, 10, 6)))
    assert augmented.sum() == 3 * 4 * 6 and (augmented[:, 1:5, 2:8] == 1).all()


def test_load_image(tmp_path):
    picture = Image.new("RGB", (5, 3))
    picture.putpixel((4, 1), (255, 51, 0))
    picture.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.shape == (3, 3, 5) and image.dtype == torch.float32
    torch.testing.assert_close(image[:, 1, 4], torch.tensor([1, 0.2, 0]))
    assert image.sum() == pytest.approx(1.2)
