"""Results kept by sample, so that several shares of a split give the same figures as one pass over all of it."""

from collections.abc import Mapping

import torch.distributed as dist


class SampleResults:
    """Base of the metrics: `add(token, …)` for each sample, `merge` what others have, `compute()` the figures.

    A result that was added for one sample twice, or by several ranks, counts once: the first one stays. Figures do not
    depend on the order in which samples came. A figure that does not exist is None, see `known` and `figure_text`.

    Args:
        settings: what two metrics must have in common to be merged.
    """

    def __init__(self, **settings):
        self.settings = settings
        self.samples = {}

    def compute(self) -> dict[str, float | None]:
        raise NotImplementedError

    def merge(self, *others: "SampleResults") -> None:
        """Takes in the samples of other metrics of the same kind and settings.

        Raises:
            ValueError: another kind or other settings.
        """
        for other in others:
            if type(other) is not type(self) or other.settings != self.settings:
                kinds = f"{type(other).__name__}{other.settings} cannot join {type(self).__name__}{self.settings}"
                raise ValueError(f"merge: {kinds}")
            for token, result in other.samples.items():
                self.samples.setdefault(token, result)

    def compute_over_ranks(self) -> dict[str, float | None]:
        """The figures of all ranks' samples together, the same on every rank; all ranks must call this.

        The first rank computes; what it raises is raised on every rank.
        """
        if not dist.is_initialized():
            return self.compute()
        main = dist.get_rank() == 0
        parts = [None] * dist.get_world_size() if main else None
        dist.gather_object(self, parts, dst=0)
        outcome = [None]
        if main:
            try:
                parts[0].merge(*parts[1:])
                outcome = [parts[0].compute()]
            except (ValueError, OSError, ImportError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def in_order(self) -> list:
        """The samples' results by token, whatever the order they came in."""
        return [self.samples[token] for token in sorted(self.samples)]


def known(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Returns the figures that exist, for logs that take numbers only."""
    return {name: value for name, value in figures.items() if value is not None}


def figure_text(value: float | None, form: str = ".4f") -> str:
    """Writes a figure for people: "n/a" where there is none."""
    return "n/a" if value is None else format(value, form)
