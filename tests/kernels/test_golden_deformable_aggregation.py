"""deformable_aggregation against the values and gradients that upstream's kernel gives on made-up inputs."""

import numpy as np
import pytest
import torch

from rigfuse.kernels import deformable_aggregation
from support.golden import golden_sets

CASES = [(folder, case) for folder in golden_sets("deformable_aggregation") for case in folder.settings["cases"]]
pytestmark = pytest.mark.skipif(not CASES, reason="no golden set of deformable_aggregation beside the checkout")


def maps_by_size(features, shapes, starts):
    """(B, cells, C) and, for each (camera, level), (h, w) and first cell → groups of cameras whose maps are alike:
    (their places, for each level (B, V, C, h, w))."""
    alike = {}
    for camera, sizes in enumerate(shapes.tolist()):
        alike.setdefault(str(sizes), []).append(camera)
    for cameras in alike.values():
        levels = []
        for level, (height, width) in enumerate(shapes[cameras[0]].tolist()):
            cells = [features[:, starts[c, level] : starts[c, level] + height * width] for c in cameras]
            levels.append(torch.stack(cells, 1).unflatten(2, (height, width)).permute(0, 1, 4, 2, 3))
        yield cameras, levels


def aggregate(features, points, weights, shapes, starts, backend):
    """Cameras of unequal sizes: one call for each size."""
    calls = maps_by_size(features, shapes, starts)
    return sum(deformable_aggregation(m, points[:, :, :, c], weights[:, :, :, c], backend=backend) for c, m in calls)


def on_a_cell_centre(points, shapes):
    """Where the derivative jumps, and float32 may stand on either side: (B, A, P, V, 2) bool."""
    near = torch.zeros(points.shape, dtype=torch.bool)
    for camera, sizes in enumerate(shapes.tolist()):
        for height, width in sizes:
            place = points[..., camera, :].double() * torch.tensor([width, height]) - 0.5
            near[..., camera, :] |= (place - place.round()).abs() < 1e-5
    return near


def compare(folder, data, results, dtype):
    """Output and gradients against upstream's in float64."""
    near = on_a_cell_centre(data["sampling_location"], data["spatial_shape"].long())
    expected = [data[f"{key}_f64"] for key in ("output", "grad_feature", "grad_location", "grad_weights")]
    for name, actual, value in zip(["output", "feature", "location", "weights"], results, expected, strict=True):
        actual, value = actual.detach().double().cpu(), value.double().reshape(actual.shape)
        if name == "location" and dtype == torch.float32:
            assert near.float().mean() < 0.3
            actual, value = actual[~near], value[~near]
        tolerance = folder.about["tolerance"]["against_f64"] * value.abs().max().clamp(min=1)
        assert (actual - value).abs().max() <= tolerance, name


def load(folder, case):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in folder.load(case).items()}


each_case = pytest.mark.parametrize("folder, case", CASES, ids=lambda value: str(getattr(value, "name", value)))


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["definition", "torch", "triton"])
def test_equals_upstream(folder, case, dtype, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes; see test_triton_equals_upstream_in_part")
    data = load(folder, case)
    leaves = [data[key].to(device, dtype).requires_grad_() for key in ("feature", "sampling_location", "weights")]
    out = aggregate(*leaves, data["spatial_shape"].long(), data["scale_start_index"].long(), backend)
    gradients = torch.autograd.grad(out, leaves, data["grad_output"].to(device, dtype))
    compare(folder, data, [out, *gradients], dtype)


@each_case
def test_triton_equals_upstream_in_part(folder, case, device):
    """The gradients of one sample, three anchors and one camera, and of its coarse maps."""
    data, anchors = load(folder, case), slice(0, 3)
    shapes, starts = data["spatial_shape"].long()[:1], data["scale_start_index"].long()[:1]
    feature, points, weights, grad = (
        data[name].double().to(device)[:1] for name in ("feature", "sampling_location", "weights", "grad_output")
    )
    (_, maps), *_ = maps_by_size(feature, shapes, starts)
    coarse = [level for level in range(len(maps)) if maps[level][0, 0, 0].numel() < 100]
    points, weights = points[:, anchors, :, :1].requires_grad_(), weights[:, anchors, :, :1].requires_grad_()
    leaves = [*(maps[level].requires_grad_() for level in coarse), points, weights]
    found = [], []
    for backend, results in zip(("triton", "definition"), found):
        out = deformable_aggregation(maps, points, weights, backend=backend)
        results += [out, *torch.autograd.grad(out, leaves, grad[:, anchors])]
    for actual, value in zip(*found):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9)
    *_, dpoints, dweights = found[0]
    for actual, name in ((dpoints, "grad_location"), (dweights, "grad_weights")):
        value = data[f"{name}_f64"][:1, anchors, :, :1].to(device).reshape(actual.shape)
        assert (actual - value).abs().max() <= folder.about["tolerance"]["against_f64"] * value.abs().max().clamp(min=1)
