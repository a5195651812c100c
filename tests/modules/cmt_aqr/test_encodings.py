import math
from dataclasses import replace

import pytest
import torch

from rigfuse.modules.cmt_aqr.encodings import CoordinateEncoding
from rigfuse.modules.maps_layout import MapLayout
from rigfuse.modules.positions import sinusoidal
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig

NAN, INF = math.nan, math.inf
RIG = nuscenes_like_rig()
# Six rotated, mirrored and cropped images of 800×320 pixels, as 5×12.5 cells of 64: the last column is half image.
AUGMENTED = RIG.augmented(ImageAugmentation(resize=0.5, crop=(0, 130, 800, 320), flip=True, rotation=4.0))
IMAGE_T_EGO = torch.stack([AUGMENTED.image_T_ego, RIG.augmented(ImageAugmentation(resize=0.5)).image_T_ego])
SHAPE, STRIDE, DEPTHS = (5, 12), 64, 7
RANGE = (-51.2, -40.0, -3.0, 51.2, 60.0, 5.0)
SPAN = torch.tensor(RANGE, dtype=torch.float64)[3:] - torch.tensor(RANGE, dtype=torch.float64)[:3]
LOW = torch.tensor(RANGE[:3], dtype=torch.float64)


def encoding(channels=8, depths=DEPTHS, heads=0):
    torch.manual_seed(3)
    layout = MapLayout((4, 6), SHAPE, stride=STRIDE, point_range=RANGE)
    return CoordinateEncoding(channels, layout, depths=depths, heads=heads).double()


def queries(module, points, image_T_ego):
    layout = replace(module.layout, cameras=image_T_ego.shape[1])
    return module.queries(points, image_T_ego, layout.cells(points, image_T_ego))


def at_depth(sample, camera, cell, depth):
    """The ego point that the centre of a cell (column, row) shows at a depth."""
    u, v = ((c + 0.5) * STRIDE - 0.5 for c in cell)
    pixel = torch.tensor([u * depth, v * depth, depth, 1.0], dtype=torch.float64)
    return (torch.linalg.inv(IMAGE_T_EGO[sample, camera]) @ pixel)[:3]


def test_the_tokens_come_in_order_and_know_their_place():
    module = encoding()
    memory = module.memory(IMAGE_T_EGO)
    assert memory.shape == (2, 4 * 6 + 6 * 5 * 12, 8)
    # BEV row 1, column 4: the centre of the cell, y first along the rows.
    place = torch.tensor([4.5 / 6, 1.5 / 4], dtype=torch.float64)
    torch.testing.assert_close(memory[1, 6 + 4], module.bev_embedding(sinusoidal(place, 16)))
    for sample, camera, column, row in ((0, 0, 0, 0), (1, 5, 11, 4), (0, 3, 7, 2)):
        depths = [1 + k * (51.2 - 1) / (DEPTHS - 1) for k in range(DEPTHS)]
        ray = torch.stack([at_depth(sample, camera, (column, row), depth) for depth in depths])
        token = memory[sample, 24 + camera * 60 + row * 12 + column]
        torch.testing.assert_close(token, module.rv_embedding(((ray - LOW) / SPAN).flatten()))


def test_a_query_resembles_the_tokens_that_show_it():
    """A point on the ray of a cell's centre has that cell's encoding, at any depth, besides that of its x and y."""
    module = encoding()
    memory = module.memory(IMAGE_T_EGO)
    for sample, camera, cell, depth in ((0, 0, (6, 2), 1.5), (0, 0, (6, 2), 40.0), (1, 5, (7, 3), 9.0)):
        point = at_depth(sample, camera, cell, depth)
        reference = point.expand(2, 1, 3)
        place = ((point - LOW) / SPAN)[:2]
        views = queries(module, reference, IMAGE_T_EGO)[sample, 0] - module.bev_embedding(sinusoidal(place, 16))
        token = memory[sample, 24 + camera * 60 + cell[1] * 12 + cell[0]]
        torch.testing.assert_close(views, token)


def test_with_heads_equal_places_are_alike_from_the_start():
    """Inner products of one head are twice the sum of the cosines of 1, 2, 4 and 8 times what two places differ by:
    half turns over the range along x and y, or the angle round the ego and twice the slope of two rays."""
    module = encoding(channels=48, heads=3)  # two heads for the BEV map, one for the cameras
    memory = module.memory(IMAGE_T_EGO)[0]
    assert not memory[:24, 32:].any() and not memory[24:, :32].any()
    half_turns = math.pi * torch.tensor([3 / 6, -2 / 4], dtype=torch.float64)  # from cell (1, 3) to (4, 1)
    a, b = memory[3 * 6 + 1], memory[1 * 6 + 4]
    for head in (slice(0, 16), slice(16, 32)):
        torch.testing.assert_close(a[head] @ b[head], bell(half_turns))
    for one, other in (((0, 5, 2), (0, 6, 4)), ((3, 1, 1), (3, 10, 0)), ((3, 11, 2), (4, 0, 3))):
        tokens = [memory[24 + camera * 60 + row * 12 + column, 32:] for camera, column, row in (one, other)]
        rays = [at_depth(0, c, (u, v), 9.0) - at_depth(0, c, (u, v), 2.0) for c, u, v in (one, other)]
        turns, slopes = zip(*((torch.atan2(y, x), z / torch.hypot(x, y)) for x, y, z in rays))
        torch.testing.assert_close(
            tokens[0] @ tokens[1], bell(torch.stack([turns[0] - turns[1], 2 * (slopes[0] - slopes[1])]))
        )
    point = at_depth(0, 3, (7, 2), 6.0)
    query = queries(module, point.expand(2, 1, 3), IMAGE_T_EGO)[0, 0]
    torch.testing.assert_close(query[32:], memory[24 + 3 * 60 + 2 * 12 + 7, 32:])
    reference = torch.tensor([[[20.0, 1.0, 1.0], [-15.0, 0.3, 0.5]]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda points: queries(module, points, IMAGE_T_EGO[:1]), reference)


def bell(phases):
    return 2 * torch.cos(torch.tensor([[1.0], [2.0], [4.0], [8.0]]) * phases).sum()


def test_the_cameras_that_see_a_query_are_summed_and_none_adds_nothing():
    module = encoding()
    between = torch.tensor([30.0, 17.0, 1.5])  # in the views of FRONT and FRONT_LEFT
    below = torch.tensor([0.5, 0.2, -2.5])  # under the car
    reference = torch.stack([between, below]).expand(2, 2, 3)
    out = queries(module, reference, IMAGE_T_EGO)[1]
    bev = module.bev_embedding(sinusoidal(((reference[1] - LOW) / SPAN)[:, :2], 16))
    alone = [queries(module, reference, IMAGE_T_EGO[:, [camera]])[1] - bev for camera in range(6)]
    torch.testing.assert_close(out, bev + sum(alone))
    assert [bool(part[0].abs().max() > 1e-3) for part in alone] == [True, True, False, False, False, False]
    torch.testing.assert_close(out[1], bev[1])


def test_a_reference_that_is_nowhere_does_no_harm():
    module = encoding()
    reference = torch.rand(2, 6, 3, dtype=torch.float64) * SPAN + LOW
    clean = queries(module, reference, IMAGE_T_EGO)
    reference[0, 1], reference[1, 4] = torch.tensor([5.0, NAN, 1.0]), INF
    reference.requires_grad_()
    out = queries(module, reference, IMAGE_T_EGO)
    broken = torch.zeros(2, 6, dtype=torch.bool)
    broken[0, 1] = broken[1, 4] = True
    assert not out[broken].any()
    torch.testing.assert_close(out[~broken], clean[~broken], rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(out.square().sum(), [reference, *module.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][broken].any() and gradients[0][~broken].any(-1).all()


def test_gradients_of_the_reference():
    module = encoding(depths=3)
    reference = torch.tensor([[[20.0, 1.0, 1.0], [-15.0, 3.0, 0.5]]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda points: queries(module, points, IMAGE_T_EGO[:1]), reference)


def test_autocast_changes_nothing():
    module = encoding().float()
    reference = (torch.rand(2, 6, 3) * SPAN + LOW).float()
    expected = module.memory(IMAGE_T_EGO), queries(module, reference, IMAGE_T_EGO)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = module.memory(IMAGE_T_EGO), queries(module, reference, IMAGE_T_EGO)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(actual, expected))


def test_three_rows_of_the_projection_are_enough():
    module, reference = encoding(), torch.rand(2, 3, 3, dtype=torch.float64) * SPAN + LOW
    rows = IMAGE_T_EGO[:, :, :3]
    assert torch.equal(module.memory(rows), module.memory(IMAGE_T_EGO))
    assert torch.equal(queries(module, reference, rows), queries(module, reference, IMAGE_T_EGO))
    assert queries(module, reference[:, :0], rows).shape == (2, 0, 8)


def test_settings_and_geometry_that_do_not_fit():
    with pytest.raises(ValueError, match="channels is 7, needs an even number"):
        CoordinateEncoding(7, MapLayout())
    with pytest.raises(ValueError, match="depths is 0, needs at least 1"):
        CoordinateEncoding(8, MapLayout(), depths=0)
    with pytest.raises(ValueError, match="channels is 24, needs a multiple of 4 for each of 4 heads"):
        CoordinateEncoding(24, MapLayout(), heads=4)
    for call in (
        encoding().memory,
        lambda matrix: encoding().queries(torch.zeros(2, 1, 3), matrix, torch.zeros(2, 1, 7, 2)),
    ):
        with pytest.raises(TypeError, match="image_T_ego is float32, needs float64"):
            call(IMAGE_T_EGO.float())
        with pytest.raises(ValueError, match=r"image_T_ego has shape \(6, 4, 4\), needs \((B|2), V, 3 or 4, 4\)"):
            call(IMAGE_T_EGO[0])
