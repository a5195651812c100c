import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rigfuse.modules.lidar.second import SECOND, SECONDNeck, SparseMiddleEncoder, VoxelEncoder, voxelize
from rigfuse.modules.lidar.sparse import SparseTensor

RANGE, SIZE = (-6.4, -3.2, -3.0, 6.4, 3.2, 5.0), (0.2, 0.2, 0.5)  # x, y, z: 64 × 32 × 16 voxels
GRID = (16, 32, 64)  # z, y, x
NAN, INF = float("nan"), float("inf")


def random_points(count=400, samples=2):
    """Clusters inside the range, so that voxels hold several points, and a shell outside it."""
    low, high = torch.tensor(RANGE).view(2, 3)
    places = (torch.rand(count // 4, 3) * 1.2 - 0.1).repeat(4, 1) * (high - low) + low + 0.02 * torch.randn(count, 3)
    return torch.cat([places, torch.randn(count, 2)], 1), torch.randint(samples, (count,))


class Branch(nn.Module):
    """Points → map, in the sizes of the tests: three stages, so a cell is 4 voxels (0.8 m) wide."""

    def __init__(self):
        super().__init__()
        self.voxels = VoxelEncoder(5, 4, point_range=RANGE, voxel_size=SIZE)
        self.middle = SparseMiddleEncoder(4, GRID, channels=(4, 6, 8), blocks=1)
        self.second = SECOND(self.middle.out_channels, (8, 12), (1, 1))
        self.neck = SECONDNeck((8, 12), (8, 8))

    def forward(self, points, sample, batch_size=2):
        return self.neck(self.second(self.middle(self.voxels(points, sample, batch_size))))


def test_voxelize_sorts_every_point_into_its_voxel():
    points, sample = random_points()
    points = points.double()
    voxels = voxelize(points, sample, 2, RANGE, SIZE)
    expected = {}  # one point after another, in plain Python
    for point, b in zip(points.tolist(), sample.tolist()):
        x, y, z = ((p - low) // size for p, low, size in zip(point, RANGE[:3], SIZE))
        if 0 <= z < GRID[0] and 0 <= y < GRID[1] and 0 <= x < GRID[2]:
            expected.setdefault((b, int(z), int(y), int(x)), []).append(point)
    assert len(expected) < sum(map(len, expected.values())) < len(points)
    assert [tuple(row) for row in voxels.coordinates.tolist()] == sorted(expected)
    groups = voxels.points.split(voxels.lengths.tolist())
    assert [group.tolist() for group in groups] == [expected[key] for key in sorted(expected)]


def test_points_that_are_nowhere_are_dropped():
    inside = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0])
    bad = inside.repeat(14, 1)
    for row, (column, value) in enumerate(
        [(0, NAN), (1, INF), (2, -INF), (3, NAN), (4, INF), (0, 1e38), (1, -1e38), (0, 6.4), (1, 3.2), (2, 5.0)]
        + [(0, -6.41), (1, -3.21), (2, -3.01), (0, 2.0**40)]
    ):
        bad[row, column] = value
    voxels = voxelize(torch.cat([bad, inside[None]]), torch.zeros(15).long(), 1, RANGE, SIZE)
    assert torch.equal(voxels.points, inside[None]) and voxels.lengths.tolist() == [1]
    assert voxelize(torch.tensor([RANGE[:3]]), torch.zeros(1).long(), 1, RANGE, SIZE).coordinates.tolist() == [[0] * 4]
    module = VoxelEncoder(point_range=RANGE, voxel_size=SIZE)
    assert module(bad, torch.zeros(14).long(), 1).features.shape == (0, 16)


def test_the_features_of_a_voxel():
    module = VoxelEncoder(5, 16, point_range=RANGE, voxel_size=SIZE).double().eval()
    nn.init.normal_(module.norm.running_mean)
    points, sample = random_points()
    points = points.double()
    out = module(points, sample, 2)
    voxels = voxelize(points, sample, 2, RANGE, SIZE)
    rows = []
    for group, (_, z, y, x) in zip(voxels.points.split(voxels.lengths.tolist()), voxels.coordinates.tolist()):
        cell = torch.tensor([x, y, z], dtype=torch.float64)
        center = torch.tensor(RANGE[:3], dtype=torch.float64) + (cell + 0.5) * torch.tensor(SIZE, dtype=torch.float64)
        described = torch.cat([group, group[:, :3] - group[:, :3].mean(0), group[:, :3] - center], 1)
        normalised = (module.linear(described) - module.norm.running_mean) / (1 + 1e-3) ** 0.5
        rows.append(F.relu(normalised).amax(0))
    torch.testing.assert_close(out.features, torch.stack(rows))
    assert torch.equal(out.coordinates, voxels.coordinates) and out.spatial_shape == GRID


def test_gradients_of_the_voxel_encoder():
    points, sample = random_points(24, 1)
    module = VoxelEncoder(5, 3, point_range=RANGE, voxel_size=SIZE).double()

    def function(*parameters):
        named = dict(zip((name for name, _ in module.named_parameters()), parameters))
        return torch.func.functional_call(module, named, (points.double(), sample, 1)).features

    assert torch.autograd.gradcheck(function, tuple(module.parameters()))


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
        middle, second, neck = SparseMiddleEncoder(), SECOND(), SECONDNeck()
        maps = second(torch.zeros(1, middle.out_channels, 128, 128))
        assert middle.out_channels == 256 and VoxelEncoder().spatial_shape == middle.spatial_shape == (40, 1024, 1024)
        assert [x.shape for x in maps] == [(1, 128, 128, 128), (1, 256, 64, 64)]
        assert neck(maps).shape == (1, 512, 128, 128)
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


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(points=torch.zeros(3, 2)), ValueError, r"points has shape \(3, 2\), needs \(P, F\) with F ≥ 3"),
        (dict(sample=torch.zeros(2).long()), ValueError, r"sample has shape \(2,\), needs \(P\) = \(3\)"),
        (dict(points=torch.zeros(3, 5).half()), TypeError, "points is float16, needs float32, float64"),
        (dict(sample=torch.zeros(3)), TypeError, "sample is float32, needs int64"),
        (dict(sample=torch.tensor([0, 2, 1])), ValueError, "sample has values from 0 to 2, needs 0 to 1"),
        (dict(sample=torch.tensor([0, -1, 1])), ValueError, "sample has values from -1 to 1"),
        (dict(voxel_size=(0.3, 0.2, 0.5)), ValueError, "needs whole numbers above 0"),
        (dict(voxel_size=(0.2, 0.2, 0.0)), ValueError, "needs six limits and three sizes above 0"),
        (dict(point_range=RANGE[3:] + RANGE[:3]), ValueError, "needs whole numbers above 0"),
        (dict(point_range=RANGE[:5]), ValueError, "needs six limits"),
    ],
)
def test_bad_points(change, error, message):
    points = dict(points=torch.zeros(3, 5), sample=torch.tensor([0, 0, 1]), batch_size=2)
    arguments = dict(**points, point_range=RANGE, voxel_size=SIZE)
    voxelize(**arguments)
    with pytest.raises(error, match=message):
        voxelize(**{**arguments, **change})


def test_bad_settings():
    encoder = VoxelEncoder(point_range=RANGE, voxel_size=SIZE)
    with pytest.raises(ValueError, match=r"points has shape \(3, 4\), needs \(P, point_features\) = \(3, 5\)"):
        encoder(torch.zeros(3, 4), torch.zeros(3).long(), 1)
    voxels = encoder(torch.zeros(3, 5), torch.zeros(3).long(), 1)
    with pytest.raises(ValueError, match=r"voxels has spatial_shape \(16, 32, 64\), needs \(40, 1024, 1024\)"):
        SparseMiddleEncoder()(voxels)
    with pytest.raises(ValueError, match=r"SECOND: .* layers \(5,\), .* needs one of each for each stage"):
        SECOND(layers=(5,))
    with pytest.raises(ValueError, match=r"SECONDNeck: .* upsample \(1,\), needs one of each for each map"):
        SECONDNeck(upsample=(1,))
    with pytest.raises(ValueError, match="maps has 1 maps, needs 2"):
        SECONDNeck()([torch.zeros(1, 128, 2, 2)])
