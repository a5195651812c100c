import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rigfuse.modules.lidar.second import SECOND, LidarConfig, SECONDNeck, SparseMiddleEncoder
from rigfuse.modules.lidar.sparse import SparseTensor
from rigfuse.modules.lidar.voxels import VoxelEncoder
from rigfuse.modules.maps_layout import POINT_RANGE
from support.lidar import GRID, RANGE, SIZE, random_points


class Branch(nn.Module):
    """Points → map, in the sizes of the tests: three stages, so a cell is 4 voxels (0.8 m) wide."""

    def __init__(self):
        super().__init__()
        self.voxels = VoxelEncoder(RANGE, SIZE, channels=4)
        self.middle = SparseMiddleEncoder(4, GRID, channels=(4, 6, 8), blocks=1)
        self.second = SECOND(self.middle.out_channels, (8, 12), (1, 1))
        self.neck = SECONDNeck((8, 12), (8, 8))

    def forward(self, points, sample, batch_size=2):
        return self.neck(self.second(self.middle(self.voxels(points, sample, batch_size))))


def test_a_point_lights_up_its_cell():
    """Row v = y, column u = x: the map is not zero within a cell's reach of the point, and is zero elsewhere."""
    module = Branch().eval()
    for x, y, u, v in [(-5.0, 2.5, 1, 7), (5.5, -3.1, 14, 0), (0.1, 0.1, 8, 4), (-6.39, -3.19, 0, 0)]:
        points = torch.tensor([[x, y, 0.0, 1.0, 0.0]] * 2)
        voxels = module.voxels(points[:1], torch.ones(1).long(), 2)
        cells = module.middle(voxels.with_features(voxels.features + 1))
        assert cells.shape == (2, module.middle.out_channels, 8, 16)
        lit = cells.abs().amax(1).nonzero()
        assert [1, v, u] in lit.tolist()
        assert (lit[:, 0] == 1).all() and (lit[:, 1:] - torch.tensor([v, u])).abs().max() <= 1


def test_sizes_of_the_configuration():
    with torch.device("meta"):
        branch = LidarConfig().build(POINT_RANGE, channels=256)
        maps = branch.backbone(torch.zeros(1, branch.middle_encoder.out_channels, 128, 128))
        assert branch.middle_encoder.out_channels == 256
        assert branch.voxel_encoder.spatial_shape == branch.middle_encoder.spatial_shape == (40, 1024, 1024)
        assert LidarConfig().bev_shape(POINT_RANGE) == (128, 128)
        assert [x.shape for x in maps] == [(1, 128, 128, 128), (1, 256, 64, 64)]
        assert branch.neck(maps).shape == (1, 512, 128, 128)
    assert SparseMiddleEncoder(4, (8, 64, 64), channels=(4, 4, 4, 4), blocks=1).out_channels == 4


def test_a_full_grid_is_the_dense_network():
    """The sparse network on a grid without a gap equals the same layers as dense convolutions."""
    module = SparseMiddleEncoder(2, (6, 4, 8), channels=(3, 4), blocks=1).double().eval()
    sites = torch.ones(1, 6, 4, 8).nonzero()
    voxels = SparseTensor(torch.randn(len(sites), 2, dtype=torch.float64), sites, (6, 4, 8), 1)

    def conv(x, layer, stride=1, kernel=(3, 3, 3), padding=1):
        weight = layer.weight.unflatten(0, kernel).permute(4, 3, 0, 1, 2)
        return F.conv3d(x, weight, stride=stride, padding=padding) / (1 + 1e-3) ** 0.5

    def block(x, basic):
        return F.relu(x + conv(F.relu(conv(x, basic.block.conv)), basic.conv))

    (first,), (down, second) = module.stages
    x = block(F.relu(conv(voxels.dense(), module.stem.conv)), first)
    x = block(F.relu(conv(x, down.conv, stride=2)), second)
    x = F.relu(conv(x, module.collapse.conv, (2, 1, 1), (3, 1, 1), 0))
    torch.testing.assert_close(module(voxels), x.flatten(1, 2))


def test_the_order_of_points_does_not_matter():
    module, (points, sample) = Branch().double(), random_points()
    order = torch.randperm(len(points))
    points = points.double()
    torch.testing.assert_close(module(points[order], sample[order]), module(points, sample))


def test_samples_of_a_batch_do_not_see_one_another():
    module, (points, sample) = Branch().double().eval(), random_points()
    points, mine = points.double(), sample == 1
    alone = module(points[mine], torch.zeros_like(sample[mine]), 1)
    torch.testing.assert_close(module(points, sample)[1:], alone)


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_point_in_training(count):
    module, (points, _) = Branch(), random_points()
    sample = torch.ones(count).long()
    points[:1] = torch.tensor([1.0, 1, 1, 1, 1])
    out = module(points[:count], sample)
    out.square().sum().backward()
    assert out.shape == (2, 16, 8, 16) and out.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_repeats_bit_for_bit_and_reaches_every_parameter():
    module, (points, sample) = Branch(), random_points()
    runs = []
    for _ in range(2):
        module.zero_grad()
        out = module(points, sample)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        runs.append([out.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*runs))
    assert all(grad.abs().max() > 0 for grad in runs[0][1:])


def test_autocast():
    module, (points, sample) = Branch().eval(), random_points()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(points, sample)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    expected = module(points, sample).detach()
    torch.testing.assert_close(out.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def parts_that_move(network, *inputs):
    """Names of the parameters and statistics that one training step changes; weight decay would move a frozen one."""
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    out = network(*inputs)
    (torch.cat([x.flatten() for x in out]) ** 2).sum().backward()
    optimizer.step()
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("frozen, moving", [(-1, {"0", "1"}), (0, {"0", "1"}), (1, {"1"})])
def test_frozen_stages_do_not_move(frozen, moving):
    network = SECOND(3, (4, 5), (1, 1), frozen_stages=frozen)
    moved = parts_that_move(network, torch.randn(2, 3, 8, 8))
    assert {name.split(".")[1] for name in moved} == moving
    for name in network.state_dict():
        assert (name in moved) == (name.split(".")[1] in moving), name


def test_all_stages_frozen():
    network = SECOND(3, (4, 5), (1, 1), frozen_stages=3)  # as the documents say, of two
    assert not any(parameter.requires_grad for parameter in network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    network.train()(x)[1].sum().backward()
    assert x.grad.abs().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval_keeps_statistics_and_trains_parameters(norm_eval):
    networks = [
        (SECOND(3, (4, 5), (1, 1), norm_eval=norm_eval), torch.randn(2, 3, 8, 8)),
        (SECONDNeck((3, 4), (4, 4), norm_eval=norm_eval), [torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)]),
    ]
    for network, x in networks:
        moved = parts_that_move(network, x)
        statistics = {name for name, _ in network.named_buffers()}
        assert moved == set(network.state_dict()) - (statistics if norm_eval else set())


def test_the_neck_puts_maps_on_one_another():
    neck = SECONDNeck((2, 3), (4, 5), (1, 2)).double().eval()
    fine, coarse = torch.randn(1, 2, 4, 6).double(), torch.randn(1, 3, 2, 3).double()
    scale = (1 + 1e-3) ** -0.5
    first = torch.einsum("bchw,cd->bdhw", fine, neck.blocks[0][0].weight[:, :, 0, 0])
    second = torch.einsum("bchw,cdij->bdhiwj", coarse, neck.blocks[1][0].weight).reshape(1, 5, 4, 6)
    torch.testing.assert_close(neck([fine, coarse]), F.relu(torch.cat([first, second], 1) * scale))


def test_bad_settings():
    voxels = VoxelEncoder(RANGE, SIZE, channels=4)(torch.zeros(3, 5), torch.zeros(3).long(), 1)
    with pytest.raises(ValueError, match=r"voxels has spatial_shape \(16, 32, 64\), needs \(40, 64, 64\)"):
        SparseMiddleEncoder(4, (40, 64, 64), (4, 4), 1)(voxels)
    with pytest.raises(ValueError, match=r"SECOND: .* layers \(5,\), .* needs one of each for each stage"):
        SECOND(4, (4, 4), (5,))
    with pytest.raises(ValueError, match=r"SECONDNeck: .* upsample \(1,\), needs one of each for each map"):
        SECONDNeck((4, 4), (4, 4), upsample=(1,))
    with pytest.raises(ValueError, match="maps has 1 maps, needs 2"):
        SECONDNeck((4, 4), (4, 4))([torch.zeros(1, 4, 2, 2)])
