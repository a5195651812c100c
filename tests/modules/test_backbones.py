import pytest
import torch

from rigfuse.modules.backbones import FPN, BackboneConfig, PyramidConfig, ResNet, ResNetFPN

TINY = dict(resnet="tiny", frozen_stages=-1, norm_eval=False)


def pyramid(strides, **settings):
    return ResNetFPN(PyramidConfig(**TINY | settings, strides=strides), 16)


def test_resnet_and_fpn_make_resnet_fpn():
    whole = pyramid((16, 32, 64)).eval()
    resnet, fpn = ResNet(BackboneConfig(**TINY), (16, 32)).eval(), FPN((64, 128), 16, levels=3)
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
        ResNet(BackboneConfig(**TINY), (32, 16))
    with pytest.raises(ValueError, match="FPN: levels is 0"):
        FPN((4, 6), 8, levels=0)


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32, 64), (32,), (32, 64, 128)])
def test_a_pyramid_has_every_stride(strides):
    levels = pyramid(strides)(torch.randn(2, 3, 225, 400))
    expected = [(2, 16, -(-225 // stride), -(-400 // stride)) for stride in strides]
    assert [tuple(level.shape) for level in levels] == expected


def test_frozen_stages_keep_weights_and_statistics():
    backbone = pyramid((16, 32), frozen_stages=2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimiser.step()
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("body.embedder", "body.encoder.stages.0", "body.encoder.stages.1")
    assert moved and not any(name.startswith(frozen) for name in moved)
    assert any(name.startswith("body.encoder.stages.2") and "running_mean" in name for name in moved)


@pytest.mark.parametrize("strides", [(), (8, 32), (64, 128), (3, 6)])
def test_strides_that_cannot_be(strides):
    with pytest.raises(ValueError, match="strides is"):
        pyramid(strides)


def test_a_frozen_pyramid_computes_no_image_twice():
    plain = pyramid((16, 32)).eval().requires_grad_(False)
    keeps = pyramid((16, 32), remember=3).eval().requires_grad_(False)
    keeps.load_state_dict(plain.state_dict())
    seen = []
    keeps.body.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    a, b, c, d = torch.randn(4, 3, 64, 96)

    def check(*images):
        for ours, theirs in zip(keeps(torch.stack(images)), plain(torch.stack(images)), strict=True):
            torch.testing.assert_close(ours, theirs)

    check(a, b, a)
    check(b, a, c)
    check(c, b)
    check(d, a)
    check(a, c)  # there was no room for all four: the oldest went
    assert seen == [2, 1, 1, 1]
    with torch.no_grad():
        plain.fpn.smooth[0].bias += 1
    keeps.load_state_dict(plain.state_dict())
    check(c, d)
    plain.double(), keeps.double()
    a, b = a.double(), b.double()
    check(a, b)
    plain.fpn.requires_grad_(), keeps.fpn.requires_grad_()
    assert keeps(a[None])[0].requires_grad and seen == [2, 1, 1, 1, 2, 2, 1]
