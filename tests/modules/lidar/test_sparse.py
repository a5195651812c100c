import pytest
import torch
import torch.nn.functional as F

from rigfuse.modules.lidar.sparse import RowBatchNorm, SparseConv3d, SparseTensor, SubmanifoldConv3d

SHAPE = (5, 7, 6)  # z, y, x: all different
STRIDED = [
    dict(),
    dict(kernel_size=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0)),
    dict(kernel_size=(2, 3, 4), stride=(1, 2, 3), padding=(1, 0, 2)),
]


def random_tensor(share=0.2, channels=3, batch=2, dtype=torch.float64, shape=SHAPE):
    """Sites drawn at random; of two samples, what is far apart in one may be near in the order of keys."""
    coordinates = (torch.rand(batch, *shape) < share).nonzero()
    return SparseTensor(torch.randn(len(coordinates), channels, dtype=dtype), coordinates, shape, batch)


def dense_weight(weight, kernel_size):
    """(offsets, C, C') as F.conv3d's (C', C, kz, ky, kx)."""
    return weight.unflatten(0, kernel_size).permute(4, 3, 0, 1, 2)


def dense_submanifold(x, weight):
    active = x.with_features(torch.ones_like(x.features[:, :1])).dense()
    return F.conv3d(x.dense(), dense_weight(weight, (3, 3, 3)), padding=1) * active


def dense_strided(x, conv):
    weight = dense_weight(conv.weight, conv.kernel_size)
    return F.conv3d(x.dense(), weight, stride=conv.stride, padding=conv.padding)


def assert_same_with_gradients(x, conv, dense):
    """Values, and the gradients of features and weight, against those of the dense convolution."""
    x.features.requires_grad_()
    out = conv(x).dense()
    grad = torch.randn_like(out)
    expected = dense()
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected, (x.features, conv.weight), grad)
    torch.testing.assert_close(torch.autograd.grad(out, (x.features, conv.weight), grad), wanted)


@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
def test_submanifold_is_the_dense_convolution_at_active_sites(share):
    x, conv = random_tensor(share), SubmanifoldConv3d(3, 4).double()
    assert torch.equal(conv(x).coordinates, x.coordinates)
    assert_same_with_gradients(x, conv, lambda: dense_submanifold(x, conv.weight))


@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("settings", STRIDED, ids=["downsample", "collapse", "uneven"])
def test_strided_is_the_dense_convolution(settings, share):
    x, conv = random_tensor(share), SparseConv3d(3, 4, **settings).double()
    assert_same_with_gradients(x, conv, lambda: dense_strided(x, conv))
    reached = SparseConv3d(1, 1, **settings)
    reached.weight.data.fill_(1)
    ones = x.with_features(torch.ones(len(x.keys), 1))
    active = dense_strided(ones, reached)[:, 0].detach() > 0.5
    assert torch.equal(conv(x).coordinates, active.nonzero())


def test_gradcheck():
    x = random_tensor(0.3, channels=2, batch=1, shape=(3, 3, 3))
    for conv in (SubmanifoldConv3d(2, 2).double(), SparseConv3d(2, 2).double()):

        def function(features, weight):
            return torch.func.functional_call(conv, {"weight": weight}, x.with_features(features)).features

        assert torch.autograd.gradcheck(function, (x.features.detach().requires_grad_(), conv.weight))


def test_a_stage_finds_its_neighbours_once():
    x = random_tensor()
    first = SubmanifoldConv3d(3, 4).double()(x)
    assert SubmanifoldConv3d(4, 5).double()(first).neighbours() is x.neighbours()
    assert SparseConv3d(3, 4).double()(x).neighbours() is not x.neighbours()


def test_no_row_stands_twice_in_an_offset():
    """What makes gather, add and write exact: neither a target nor, for the gradient, a source repeats."""
    x = random_tensor(0.5)
    for pairs in x.neighbours():
        for rows in pairs:
            assert len(rows) == len(rows.unique())


@pytest.mark.parametrize("make", [SubmanifoldConv3d, SparseConv3d])
def test_nothing_active(make):
    x = random_tensor(0.0, dtype=torch.float32)
    x.features.requires_grad_()
    conv = make(3, 4)
    out = conv(x)
    assert out.features.shape == (0, 4) and out.dense().shape == (2, 4, *out.spatial_shape)
    out.dense().sum().backward()
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight)) and x.features.grad.shape == (0, 3)


def test_repeats_bit_for_bit():
    x = random_tensor(0.4, channels=8, dtype=torch.float32)
    x.features.requires_grad_()
    network = torch.nn.Sequential(SubmanifoldConv3d(8, 8), SparseConv3d(8, 8))
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            fresh = SparseTensor(x.features, x.coordinates, SHAPE, 2)
            out = network(fresh).features
            runs.append((out, *torch.autograd.grad(out.square().sum(), (x.features, *network.parameters()))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_autocast_multiplies_narrow_and_adds_wide():
    """256 + 26 · 0.5: in bfloat16 the halves would be lost one after the other."""
    x = random_tensor(1.0, channels=1, dtype=torch.float32).with_features(torch.ones(2 * 5 * 7 * 6, 1))
    conv = SubmanifoldConv3d(1, 1)
    with torch.no_grad():
        conv.weight.fill_(0.5)
        conv.weight[0] = 256
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(x)
    assert out.features.dtype == torch.bfloat16
    assert torch.equal(out.dense()[0, 0, 2, 3, 3], torch.tensor(269.0).bfloat16())
    out.features.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(conv.weight.grad[13].item(), float(len(x.keys)))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_are_normalised_by_running_statistics(rows):
    norm = RowBatchNorm(3)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.running_var.copy_(torch.tensor([4.0, 4.0, 9.0]))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(rows, 3)
    expected = (x - before["running_mean"]) / (before["running_var"] + 1e-3).sqrt()
    out = norm(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert norm.weight.grad.shape == (3,)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


SITES = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [1, 4, 6, 5]])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(features=torch.zeros(2, 3)), ValueError, r"coordinates has shape \(3, 4\), needs \(N, 4\) = \(2, 4\)"),
        (dict(features=torch.zeros(3, 3).int()), TypeError, "features is int32, needs float32"),
        (dict(coordinates=SITES.int()), TypeError, "coordinates is int32, needs int64"),
        (dict(coordinates=SITES.flip(0)), ValueError, "coordinates are out of order or repeat"),
        (dict(coordinates=SITES[[0, 0, 1]]), ValueError, "coordinates are out of order or repeat"),
        (dict(coordinates=SITES - 1), ValueError, "coordinates lie outside the grid"),
        (dict(batch_size=1), ValueError, "coordinates lie outside the grid"),
        (dict(spatial_shape=(5, 7, 5)), ValueError, r"outside the grid.* 2 grids of \(5, 7, 5\)"),
    ],
)
def test_bad_sites(change, error, message):
    arguments = dict(features=torch.zeros(3, 3), coordinates=SITES, spatial_shape=SHAPE, batch_size=2)
    SparseTensor(**arguments)
    with pytest.raises(error, match=message):
        SparseTensor(**{**arguments, **change})


def test_bad_input():
    x = random_tensor()
    with pytest.raises(ValueError, match=r"SubmanifoldConv3d: features has shape .*, needs \(N, in_channels\)"):
        SubmanifoldConv3d(4, 4)(x)
    with pytest.raises(ValueError, match=r"spatial_shape is \(2, 7, 6\), needs at least the kernel"):
        SparseConv3d(3, 3, (3, 1, 1), (2, 1, 1), (0, 0, 0))(random_tensor(shape=(2, 7, 6)))
