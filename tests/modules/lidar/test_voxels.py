import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rigfuse.modules.lidar.voxels import VoxelEncoder, voxelize
from support.lidar import GRID, RANGE, SIZE, random_points

NAN, INF = float("nan"), float("inf")


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
    module = VoxelEncoder(RANGE, SIZE)
    assert module(bad, torch.zeros(14).long(), 1).features.shape == (0, 16)


def test_the_features_of_a_voxel():
    module = VoxelEncoder(RANGE, SIZE).double().eval()
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
    module = VoxelEncoder(RANGE, SIZE, channels=3).double()

    def function(*parameters):
        named = dict(zip((name for name, _ in module.named_parameters()), parameters))
        return torch.func.functional_call(module, named, (points.double(), sample, 1)).features

    assert torch.autograd.gradcheck(function, tuple(module.parameters()))


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


def test_points_that_do_not_fit_the_encoder():
    with pytest.raises(ValueError, match=r"points has shape \(3, 4\), needs \(P, point_features\) = \(P, 5\)"):
        VoxelEncoder(RANGE, SIZE)(torch.zeros(3, 4), torch.zeros(3).long(), 1)
