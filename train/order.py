"""Which samples a step sees, and the random state it begins with: functions of (seed, epoch) and (seed, rank, step)."""

from collections.abc import Iterator

import torch

from .distributed import World


class EpochBatches:
    """Batch sampler: this rank's batches of one epoch, as lists of (epoch, index).

    Every epoch is a permutation drawn from (seed, epoch). `start` samples of it are done, whatever shape the steps had
    in which they were; what then does not fill a step on all ranks is left out.
    """

    def __init__(self, length: int, batch_size: int, accumulate: int, world: World, seed: int):
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.world, self.seed = world, seed
        self.per_step = batch_size * accumulate * world.size  # samples, over all ranks
        self.steps = length // self.per_step  # of a whole epoch
        if self.steps == 0:
            needed = f"{batch_size} (batch) × {accumulate} (accumulate) × {world.size} (ranks)"
            raise ValueError(f"the training set has {length} items, one step needs {needed}")
        self.epoch = self.start = 0

    @property
    def steps_left(self) -> int:
        return (self.length - self.start) // self.per_step

    def __len__(self) -> int:
        return self.steps_left * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()[self.start :]
        for batch in range(len(self)):
            first = (batch * self.world.size + self.world.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def seed_step(seed: int, rank: int, step: int) -> None:
    """Every step begins with the random state that belongs to it, on the CPU and on the GPU."""
    torch.manual_seed(hash_seed(seed, rank, step))


def hash_seed(*numbers: int) -> int:
    """A seed for each tuple of numbers; neighbours share nothing (splitmix64's mixing, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
