"""Which samples a step sees: shared out over ranks, gone on with wherever an epoch was left."""

import pytest

from rigfuse.train.distributed import World
from rigfuse.train.order import EpochBatches, hash_seed


def epoch(ranks, batch_size, accumulate=1, start=0, length=23, number=0):
    """The indices of an epoch's steps, each over all ranks, in the order in which a step has them."""
    shares = [EpochBatches(length, batch_size, accumulate, World(rank, ranks), seed=5) for rank in range(ranks)]
    for share in shares:
        share.epoch, share.start = number, start
    batches = [list(share) for share in shares]
    assert all(len(own) == len(share) == share.steps_left * accumulate for own, share in zip(batches, shares))
    assert {pair[0] for own in batches for batch in own for pair in batch} <= {number}
    return [index for of_ranks in zip(*batches) for batch in of_ranks for _, index in batch]


def test_an_epoch_is_shared_out_completely():
    seen = epoch(ranks=3, batch_size=2)
    assert len(seen) == len(set(seen)) == 18
    assert seen != epoch(ranks=3, batch_size=2, number=1)
    assert set(seen) <= set(range(23))


@pytest.mark.parametrize("ranks, batch_size, accumulate", [(1, 1, 1), (2, 2, 1), (1, 4, 2), (3, 1, 2)])
def test_the_order_does_not_depend_on_the_shape_of_a_step(ranks, batch_size, accumulate):
    whole = epoch(ranks=1, batch_size=1)
    assert len(whole) == 23
    for start in (0, 6, 15):
        part = epoch(ranks, batch_size, accumulate, start=start)
        per_step = ranks * batch_size * accumulate
        assert part == whole[start : start + (23 - start) // per_step * per_step]


def test_too_few_for_a_step():
    with pytest.raises(ValueError, match=r"has 24 items, one step needs 32 \(batch\) × 1 \(accumulate\) × 1 \(ranks\)"):
        EpochBatches(24, 32, 1, World(), seed=0)


def test_seeds_of_neighbours_differ():
    seeds = [hash_seed(seed, rank, step) for seed in range(3) for rank in range(8) for step in range(100)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert hash_seed(1, 2) != hash_seed(2, 1)
