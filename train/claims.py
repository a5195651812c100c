"""What the design documents claim, written once: the benchmark and the record of an experiment judge by these."""

from dataclasses import dataclass

HOLDS, FAILS, UNSURE, ABSENT = "holds", "does not hold", "cannot tell", "not measured"


@dataclass(frozen=True)
class Claim:
    """A limit for the ratio of a figure to the same figure before.

    at_least: a ratio of speeds, which reaches `limit` or more; else one of memory, which is `limit` or less.
    promised: the documents promise it; else they only expect it.
    """

    text: str
    limit: float
    at_least: bool
    promised: bool = False

    def verdict(self, low: float, high: float | None = None) -> str:
        """Judges a ratio that lies between `low` and `high` (None: it is `low` exactly)."""
        high = low if high is None else high
        if not low <= high:  # a NaN among them
            return UNSURE
        met = [ratio >= self.limit if self.at_least else ratio <= self.limit for ratio in (low, high)]
        return HOLDS if all(met) else UNSURE if any(met) else FAILS


# V2 against V1, stage 1 alone
STAGE_MEMORY = Claim("memory −50 %", 0.5, at_least=False, promised=True)
STAGE_SPEED = Claim("speed +40 %", 1.4, at_least=True, promised=True)
# V2 against V1, a whole run
RUN_MEMORY = Claim("memory −30 to −50 %", 0.7, at_least=False)
RUN_SPEED = Claim("speed +20 to +40 %", 1.2, at_least=True)
ACCURACY = 0.01  # relative: within it the figures of V2 count as V1's
# the detector with frozen branches against all of it training
FROZEN_MEMORY = Claim("memory −30 %", 0.7, at_least=False)
FROZEN_SPEED = Claim("speed +30 %", 1.3, at_least=True)
# the detector's step with routing against the same without
ROUTING_MEMORY = Claim("memory at most +5 %", 1.05, at_least=False)
ROUTING_SPEED = Claim("time at most +5 %", 1 / 1.05, at_least=True)

KEYS = "attention reads 3·T·H·W keys instead of 6·T·H·W"
EQUAL = "outputs and gradients equal where the topologies are made equal"
