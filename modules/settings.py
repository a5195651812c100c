"""Types of settings that say which values they may have: `heads: Count = 8`.

The configuration dataclasses beside the modules use them; `rigfuse.train.config.check` holds settings to them.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may be, as an annotation of its type; None = no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {name: bound for name, bound in vars(self).items() if bound is not None}
        return " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())


Count = Annotated[int, Range(at_least=1)]
Whole = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Metres = Annotated[float, Range(at_least=-1000, at_most=1000)]  # a place on either side; radians too
Momentum = Annotated[float, Range(at_least=0, below=1)]
