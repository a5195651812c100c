"""Images are moved as `ImageAugmentation.matrix` says."""

import numpy as np
import pytest
import torch
from PIL import Image

from rigfuse.modules.rig import Camera, ImageAugmentation, Rig
from rigfuse.train.data.files import BadFile
from rigfuse.train.data.images import augment_image, camera_image, normalised
from rigfuse.train.data.moments import Moment


def picture(brightness):
    """(H, W) in [0, 1] → a grey PIL image."""
    return Image.fromarray(brightness.mul(255).round().byte()[..., None].expand(-1, -1, 3).numpy())


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
    image = torch.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / (2 * 3.0**2))
    augmented = torch.from_numpy(np.array(augment_image(picture(image), augmentation)))[..., 0].double()
    assert augmented.T.shape == augmentation.size(160, 121)
    v, u = torch.meshgrid(*(torch.arange(float(n)) for n in augmented.shape), indexing="ij")
    found = torch.stack([(u * augmented).sum(), (v * augmented).sum()]) / augmented.sum()
    expected = augmentation.matrix(160, 121) @ torch.tensor([*spot, 1], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected[:2], rtol=0, atol=0.02)


def test_outside_the_image_is_black():
    augmented = np.array(augment_image(picture(torch.ones(4, 6)), ImageAugmentation(crop=(-2, -1, 10, 6))))
    assert augmented.sum() == 255 * 3 * 4 * 6 and (augmented[1:5, 2:8] == 255).all()


def moment_with(path, width, height):
    """A moment of one camera whose picture is in a file."""
    camera = Camera("CAM", width, height, [[100, 0, 80], [0, 100, 60], [0, 0, 1]], torch.eye(4))
    return Moment("scene", 0.0, torch.eye(4, dtype=torch.float64), Rig([camera]), images={"CAM": path}, token="t")


def test_a_much_larger_jpeg_is_the_same_picture(tmp_path):
    """It is decoded at a part of its size; nothing may move."""
    v, u = torch.meshgrid(torch.arange(360.0), torch.arange(640.0), indexing="ij")
    image = picture(torch.sin(u / 9) * torch.cos(v / 11) / 2 + 0.5)
    image.save(tmp_path / "a.jpg", quality=98)
    small = ImageAugmentation(resize=0.15, crop=(3, 2, 90, 50))
    from_file = camera_image(moment_with(tmp_path / "a.jpg", 640, 360), "CAM", small).permute(1, 2, 0).numpy()
    assert np.abs(from_file.astype(float) - np.array(augment_image(image, small))).max() < 4


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
@pytest.mark.parametrize("size", [(320, 242), (80, 60), (107, 81), (160, 121)], ids=str)
def test_a_file_of_another_size_shows_the_same_view(tmp_path, augmentation, size):
    """The spot lands where the camera of the tables (160 × 121), augmented, sees it."""
    spot, (width, height) = (83.3, 61.6), size
    v, u = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    u, v = (u + 0.5) * 160 / width - 0.5, (v + 0.5) * 121 / height - 0.5
    picture(torch.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / (2 * 4.0**2))).save(tmp_path / "a.png")
    moment = moment_with(tmp_path / "a.png", 160, 121)
    augmented = camera_image(moment, "CAM", augmentation)[0].double()
    camera = moment.rig.augmented(augmentation)["CAM"]
    assert augmented.T.shape == (camera.width, camera.height)
    v, u = torch.meshgrid(*(torch.arange(float(n)) for n in augmented.shape), indexing="ij")
    found = torch.stack([(u * augmented).sum(), (v * augmented).sum()]) / augmented.sum()
    expected = camera.intrinsics @ torch.linalg.inv(moment.rig["CAM"].intrinsics) @ torch.tensor([*spot, 1]).double()
    torch.testing.assert_close(found, expected[:2], rtol=0, atol=0.05)
    assert moment.image("CAM").shape == (3, 121, 160)


def test_another_shape_is_refused_with_both_sizes(tmp_path):
    Image.new("RGB", (160, 90)).save(tmp_path / "a.png")
    moment = moment_with(tmp_path / "a.png", 160, 121)
    for read in (lambda: camera_image(moment, "CAM", ImageAugmentation()), lambda: moment.image("CAM")):
        with pytest.raises(BadFile, match="a.png is 160×90 pixels, the tables say 160×121"):
            read()


def test_normalised_bytes():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(2, 3, 1, 2)
    expected = torch.tensor([[-2.1179, 2.2489], [-2.0357, 2.4286], [-1.8044, 2.6400]])[:, None].expand(2, 3, 1, 2)
    torch.testing.assert_close(normalised(images), expected, atol=1e-4, rtol=0)
