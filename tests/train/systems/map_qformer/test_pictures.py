"""Pictures of map lines, the mean map, and where lines begin."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rigfuse.modules.map_qformer.losses import MapTruth
from rigfuse.modules.polylines import line_orders
from rigfuse.train.config import apply_options
from rigfuse.train.systems import experiment
from rigfuse.train.systems.map_qformer.anchors import find_anchors, read_anchors
from rigfuse.train.systems.map_qformer.baselines import MeanMap
from rigfuse.train.systems.map_qformer.first_step import made_up_batch
from rigfuse.train.systems.map_qformer.pictures import draw_lines


@pytest.fixture
def settings():
    options = ("data.image_size=36,64", "loader.batch_size=1", "model.points=5", "model.instances=2")
    return apply_options(experiment("map_qformer_stage2_tiny"), options)


def test_who_finds_the_truth_draws_it(settings):
    batch = made_up_batch(settings).to("cpu")
    lines, labels = batch.truth.lines[0][:, 0], batch.truth.labels[0]
    axes = draw_lines(batch, 0, (lines, labels, torch.ones(3)), settings.model).axes
    assert len(axes) == 14 and len(axes[6].lines) == 3 + 1
    for found, true in zip(axes[:7], axes[7:]):
        shown = [[(line.get_color(), line.get_xydata().tolist()) for line in side.lines] for side in (found, true)]
        assert str(shown[0]) == str(shown[1])
    assert sum(len(side.lines) for side in axes[:6]) >= 3
    unsure = draw_lines(batch, 0, (lines, labels, torch.tensor([0.1, 0.9, 0.1])), settings.model).axes
    assert len(unsure[6].lines) == 1 + 1


def made_up_samples(settings, *truths):
    """A training set of which only the lines are looked at."""
    truths = [MapTruth([torch.stack([line_orders(x) for x in lines])], [labels]) for lines, labels in truths]
    return SimpleNamespace(model=settings.model, places=range(len(truths)), lines=lambda place: truths[place])


def test_the_mean_map_says_what_is_always_there(settings):
    """A divider that every sample has, a boundary that half of them have, in other places each time."""
    divider = torch.stack([torch.linspace(-20, 20, 5), torch.full((5,), 1.0)], dim=1)
    aside = torch.tensor([0.0, 9.0])
    both = torch.stack([divider, divider + aside]), torch.tensor([0, 2])
    alone = divider[None], torch.tensor([0])
    samples = made_up_samples(settings, both, alone)
    found = MeanMap(samples)
    assert found.labels.tolist() == [0, 2] and found.scores.tolist() == [1.0, 0.5]
    torch.testing.assert_close(found.lines, both[0])
    batch = replace(made_up_batch(settings), truth=samples.lines(0))
    figures = found.evaluate([batch])
    assert figures["mAP"] == 1 and "AP/ped_crossing" not in figures


def test_anchors_are_where_lines_are(settings, tmp_path):
    divider = torch.stack([torch.linspace(-20, 20, 5), torch.zeros(5)], dim=1)
    lines = torch.stack([divider, divider + torch.tensor([0.0, 8.0])])
    samples = made_up_samples(settings, (lines, torch.tensor([0, 2])), (lines + 0.5, torch.tensor([0, 2])))
    anchors = find_anchors(samples)
    torch.testing.assert_close(anchors[anchors[:, 0, 1].argsort()], lines + 0.25)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match="^anchors is .*none.json: no anchors there"):
        read_anchors(tmp_path / "none.json")
