import pytest
import torch

from rigfuse.modules.backbones import FPN, RESNET_TINY, ResNet, ResNetFPN


def test_resnet_and_fpn_make_resnet_fpn():
    whole = ResNetFPN(RESNET_TINY, strides=(16, 32, 64), channels=8).eval()
    resnet, fpn = ResNet(RESNET_TINY, strides=(16, 32)).eval(), FPN((64, 128), 8, levels=3)
    resnet.body.load_state_dict(whole.body.state_dict())
    fpn.load_state_dict(whole.fpn.state_dict())
    images = torch.randn(2, 3, 72, 100)
    maps = resnet(images)
    assert resnet.channels == (64, 128) and [tuple(x.shape[1:]) for x in maps] == [(64, 5, 7), (128, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole(images), fpn(maps)))


def test_a_pyramid_of_fewer_levels_has_the_finest_and_no_idle_parameter():
    whole, first = FPN((4, 6), 8), FPN((4, 6), 8, levels=1)
    first.load_state_dict({name: value for name, value in whole.state_dict().items() if "smooth.1" not in name})
    maps = [torch.randn(1, 4, 6, 7), torch.randn(1, 6, 3, 4)]
    (level,) = first(maps)
    assert torch.equal(level, whole(maps)[0]) and level.shape == (1, 8, 6, 7)
    level.sum().backward()
    assert all(parameter.grad.any() for parameter in first.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"strides is \(32, 16\), needs some of \(4, 8, 16, 32\), ascending"):
        ResNet(RESNET_TINY, strides=(32, 16))
    with pytest.raises(ValueError, match="FPN: levels is 0"):
        FPN((4, 6), 8, levels=0)
