"""The figures of static BEV: what the truth scores against itself, a shift, support, pooled counts."""

import math

import numpy as np
import pytest
import torch

from rigfuse.modules.static_bev.grid import BevGrid
from rigfuse.train.systems.static_bev.raster import draw_areas, draw_lines
from rigfuse.train.systems.static_bev.series import ANY, OTHER, InstanceMetric, MapIou, SeriesMetric, ridges

shapely = pytest.importorskip("shapely")
GRID = BevGrid((-10.4, 41.6), (-11.2, 11.2), 0.2)
CLASSES = ("SolidLine", "DashedLine")
SOLID = np.array([[-30.0, 2.1], [80.0, 2.1]])  # along a row of cells
DASHED = np.array([[10.1, -30.0], [10.1, 30.0]])  # along a column


def said(lines, labels):
    return np.stack([draw_lines(GRID, [x for x, y in zip(lines, labels) if y == c], 0.4) for c in range(len(CLASSES))])


def test_truth_as_prediction_and_a_shift():
    metric = SeriesMetric(GRID, CLASSES)
    metric.add("a", said([SOLID, DASHED], [0, 1]), [SOLID, DASHED], [0, 1])
    for (name, place, _), figures in metric.figures().items():
        if place == "far" or name == OTHER:
            assert figures.support == 0 and figures.recall is figures.f1 is None
            continue
        if figures.support:
            assert figures.recall == figures.precision == figures.f1 == 1 and figures.error < 1e-6
    figures = metric.figures()
    assert figures["SolidLine", "all", 0.9].support == pytest.approx(52.0)
    assert figures["SolidLine", "near", 0.9].support == pytest.approx(30.0)
    assert figures["SolidLine", "middle", 0.9].support == pytest.approx(11.6)
    assert figures["DashedLine", "main", 0.9].support == pytest.approx(16.0)
    assert figures[ANY, "all", 0.7].type_accuracy > 0.99 and metric.compute()["series/f1"] == 1
    shifted = SeriesMetric(GRID, CLASSES)
    shifted.add("a", said([SOLID, DASHED], [0, 1]), [SOLID + [0, 0.3], DASHED + [0.3, 0]], [0, 1])
    rows = [figures for (name, place, _), figures in shifted.figures().items() if name in CLASSES and place == "all"]
    assert all(figures.recall == figures.precision == figures.f1 == 0 for figures in rows)


def test_truth_as_prediction_wherever_the_lines_run():
    rng, metric = np.random.default_rng(0), SeriesMetric(GRID, CLASSES)
    for number in range(4):
        angle, middle = rng.uniform(0, math.pi), rng.uniform([5, -6], [25, 6])
        line = middle + np.array([[-60.0], [60.0]]) * [math.cos(angle), math.sin(angle)]
        metric.add(str(number), said([line], [0]), [line], [0])
    for confidence in metric.settings["confidences"]:
        figures = metric.figures()["SolidLine", "all", confidence]
        assert figures.recall == figures.precision == 1 and figures.error < 0.1


def test_types_unknown_lines_and_pooling():
    one, two = SeriesMetric(GRID, CLASSES), SeriesMetric(GRID, CLASSES)
    one.add("a", said([SOLID, DASHED], [0, 0]), [SOLID, DASHED], [0, 1])  # a dashed line is called solid
    two.add("b", said([], []), [SOLID], [-1])
    one.merge(two)
    figures = one.figures()
    assert figures["DashedLine", "all", 0.8].recall == 0 and figures["SolidLine", "all", 0.8].recall == 1
    assert 0.6 < figures["SolidLine", "all", 0.8].precision < 0.8 and 0.6 < figures[ANY, "all", 0.8].type_accuracy < 0.8
    assert figures[OTHER, "all", 0.8].support == pytest.approx(52) and figures[OTHER, "all", 0.8].recall == 0
    assert figures[ANY, "all", 0.8].recall == pytest.approx(74.4 / 126.4, abs=0.01)
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        one.add("c", said([], []), [SOLID, DASHED], [0, 2])


def test_ridges_are_maxima_of_rows_or_columns():
    scores = np.zeros((7, 9))
    scores[2:5, :] = np.array([0.75, 0.9, 0.8])[:, None] + 1e-3 * np.arange(9)  # rises along the line
    found = ridges(scores, 0.7)
    assert found[3].all() and not found[2, :-1].any() and not found[4, :-1].any() and not found[[0, 1, 5, 6]].any()


def test_areas_are_measured_to_a_part_of_a_cell():
    box = shapely.box(0.05, -0.3, 1.0, 0.3)
    drawn = draw_areas(GRID, [box])
    assert drawn.sum() * GRID.size**2 == pytest.approx(box.area, rel=1e-6)
    assert drawn[56, 52] == pytest.approx(0.75) and drawn[57, 53] == pytest.approx(0.5)
    turned = shapely.affinity.rotate(shapely.box(0, -4, 20, 4).difference(shapely.box(5, -1, 9, 2)), 31)
    assert draw_areas(GRID, [turned]).sum() * GRID.size**2 == pytest.approx(turned.area, rel=2e-3)
    halves = [shapely.box(-50, -50, 3.3, 50), shapely.box(3.3, -50, 50, 50)]
    assert draw_areas(GRID, halves).min() == pytest.approx(1.0)  # they touch, and reach beyond the grid
    assert not draw_areas(GRID, []).any()


def test_iou_is_pooled_and_the_best_threshold_has_its_own_name():
    metric, known = MapIou(("Road", "Wall"), 0.5), torch.ones(2, 2, 2, dtype=torch.bool)
    known[1] = False
    truth = torch.zeros(2, 2, 2, dtype=torch.bool)
    truth[:, 0] = True
    metric.add("a", torch.tensor([[[0.9, 0.4], [0.1, 0.1]]]).expand(2, -1, -1), truth, known)
    metric.add("b", torch.full((2, 2, 2), 0.9), truth, known)
    figures = metric.compute()
    assert figures["iou/Road"] == figures["iou"] == (1 + 2) / (2 + 4) and figures["iou_best/Road"] == (2 + 2) / (2 + 4)
    assert figures["iou/Wall"] is None and figures["iou_best/Wall"] is None


def test_instances_by_centre_and_by_overlap():
    true = torch.tensor([[5.0, 0, 4, 2, 0.2, 0], [9.0, 3, 4, 2, 0, 0]])
    found = true + torch.tensor([[0.2, 0, 0, 0, math.pi, 0], [0.4, 0, 0, 0, 0, 0]])
    metric = InstanceMetric(("Slot", "Bump"))
    metric.add("a", found, torch.tensor([0.9, 0.8]), true, [True, False])
    figures = metric.compute()
    assert figures["ap/centre/Slot"] == 0.5 and figures["ap/iou70/Slot"] == 1 and figures["ap/centre/Bump"] is None
    metric.add("b", found[:0], torch.empty(0), true, [True, True])
    assert metric.compute()["ap/iou70"] == 0.5
