"""Two gloo ranks: with the frozen model whole on each, and split over both by FSDP2."""

import pytest
import torch

from support.maps_on_ranks import MadeUpSamples, train_on_ranks
from support.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("map-ranks")
    run_ranks(train_on_ranks, 2, path)
    return path


def states(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_ranks_hold_the_same_weights_and_figures(folder):
    for name in ("whole", "sharded", "resumed"):
        first, second = states(folder, name)
        assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items()), name
        assert first["figures"] == second["figures"] and "mAP" in first["figures"]


def test_a_sharded_model_gives_the_gradients_of_a_whole_one(folder):
    """So after two steps the weights are the same; each rank holds about half of the frozen ones."""
    whole, sharded = states(folder, "whole")[0], states(folder, "sharded")[0]
    assert whole["local"] == whole["total"] and 0 < sharded["local"] < 0.6 * sharded["total"]
    assert whole["model"].keys() == sharded["model"].keys()
    for name, value in whole["model"].items():
        torch.testing.assert_close(sharded["model"][name], value, rtol=1e-5, atol=1e-6)


def test_a_sharded_run_resumes_bit_for_bit(folder):
    whole, resumed = states(folder, "sharded")[0], states(folder, "resumed")[0]
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


def test_every_rank_evaluates_as_many_samples():
    """Or a sharded model would wait for ever; together they see all."""
    samples = MadeUpSamples(None, 5)
    shares = [samples.share(rank, 3) for rank in range(3)]
    assert {len(share) for share in shares} == {2} and {index for share in shares for index in share} == set(range(5))
