"""Average precision whatever the class, against sums by hand."""

import pytest
import torch

from rigfuse.train.metrics.any_class import FIGURES, AnyClassMetric


def figures(centres, scores, true, reach=30.0):
    metric = AnyClassMetric(reach)
    metric.add("token", torch.tensor(centres), torch.tensor(scores), torch.tensor(true))
    return [metric.compute()[name] for name in FIGURES]


def test_precision_is_that_of_the_ranks():
    """Two objects. The surest box is 1.5 m off the first, the second far from all, the third on the second object."""
    centres, true = [[11.5, 0.0], [20.0, 9.0], [0.0, 5.0]], [[10.0, 0.0], [0.0, 5.0]]
    found = figures(centres, [0.9, 0.8, 0.7], true)
    assert found == pytest.approx([1 / 3 / 2, (1 + 2 / 3) / 2, (1 + 2 / 3) / 2])


def test_an_object_is_found_once_and_a_place_counts_once():
    twice = figures([[10.0, 0.0], [10.5, 0.0]], [0.9, 0.8], [[10.0, 0.0], [0.0, 25.0]])
    assert twice == pytest.approx([0.5] * 3)
    same = figures([[5.0, 0.0], [10.0, 0.0], [5.0, 0.0]], [0.9, 0.8, 0.7], [[10.0, 0.0]])
    assert same == pytest.approx([0.5] * 3)  # the second rank of two


def test_what_is_out_of_reach_does_not_count_and_nothing_is_nothing():
    far = [[31.0, 0.0], [10.0, 0.0]]
    assert figures(far, [0.9, 0.8], [[29.0, 20.0], [10.0, 0.0]]) == pytest.approx([1.0] * 3)
    assert figures(far, [0.9, 0.8], far, reach=40.0) == pytest.approx([1.0] * 3)
    metric = AnyClassMetric(30.0)
    assert set(metric.compute().values()) == {0.0}
    metric.add("a", torch.empty(0, 9), torch.empty(0), torch.tensor([[10.0, 0.0, 0.0]]))
    assert set(metric.compute().values()) == {0.0}


def test_samples_of_others_join():
    one, other = AnyClassMetric(30.0), AnyClassMetric(30.0)
    one.add("b", torch.tensor([[10.0, 0.0]]), torch.tensor([0.5]), torch.tensor([[10.0, 0.0]]))
    other.add("a", torch.tensor([[10.0, 0.0]]), torch.tensor([0.9]), torch.tensor([[0.0, 20.0]]))
    one.merge(other)
    assert one.compute()["AP/any@1"] == pytest.approx(0.25)  # found at the second rank, one of two objects
