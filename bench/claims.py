"""The documents' claims about V2 against V1 and about frozen branches, each with the figure that this run found."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .measure import paired_ratio
from .results import Table
from .runner import Outcome
from .workload import MODE_NAMES, MODES, STEP

SPEED, MEMORY = 1.4, 0.5
STEP_SPEED, STEP_MEMORY = 1.2, 0.7  # of a whole run
FROZEN_SPEED, FROZEN_MEMORY = 1.3, 0.7  # of the detector with frozen branches
EQUAL = 256  # multiples of the dtype's epsilon within which results count as equal
CASE = "documents"  # the size that the claims were made for


@dataclass(frozen=True)
class Claim:
    """holds: None where this run did not measure it. expected: the documents expect it, and promise nothing."""

    text: str
    figure: str
    holds: bool | None
    expected: bool = False

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "not measured"}[self.holds]


def judge(outcome: Outcome, cases: Iterable[str], modes: Iterable[str], epsilon: float) -> list[Claim]:
    """The claims, at the documents' size where it was run, else at the first case. epsilon: of the run's dtype."""
    cases, table = list(cases), Table(outcome.rows)
    case = CASE if CASE in cases else cases[0]
    claims = [_keys(outcome, cases, case)]
    for mode in (mode for mode in modes if mode in MODES):
        name = f"stage 1, {MODE_NAMES[mode]}"
        claims.append(_memory(table, ("temporal", case, mode), f"memory −{1 - MEMORY:.0%}, {name}", MEMORY))
        claims.append(_speed(table, ("temporal", case, mode), f"speed +{SPEED - 1:.0%}, {name}", SPEED))
    return [*claims, *_step(outcome, table), _equality(outcome, epsilon)]


def judge_detector(outcome: Outcome) -> list[Claim]:
    """What the documents expect of freezing the detector's branches."""
    table, pair = Table(outcome.rows), ("unfrozen", "frozen")
    cases = [case for _, case in outcome.sizes]
    if not cases:
        return []
    place = ("step", CASE if CASE in cases else cases[0], STEP)
    found = [
        _memory(table, place, "memory −30 % expected, a training step with frozen branches", FROZEN_MEMORY, pair),
        _speed(table, place, "speed +30 % expected, a training step with frozen branches", FROZEN_SPEED, pair),
    ]
    return [replace(claim, expected=True) for claim in found]


def _step(outcome, table):
    """What the documents expect of the whole run."""
    cases = [case for scope, case in outcome.sizes if scope == "step"]
    if not cases:
        return []
    place = ("step", CASE if CASE in cases else cases[0], STEP)
    found = [
        _memory(table, place, "memory −30 to −50 % expected, a whole training step", STEP_MEMORY),
        _speed(table, place, "speed +20 to +40 % expected, a whole training step", STEP_SPEED),
    ]
    return [replace(claim, expected=True) for claim in found]


def _keys(outcome, cases, case):
    text = "attention reads 3·T·H·W keys instead of 6·T·H·W"
    pairs = {c: (outcome.keys.get((c, "v2")), outcome.keys.get((c, "v1"))) for c in cases}
    if None in pairs[case]:
        return Claim(text, "—", None)
    v2, v1 = pairs[case]
    holds = all(None in pair or 2 * pair[0] == pair[1] for pair in pairs.values())
    return Claim(text, f"{v2:,} instead of {v1:,} ({case})", holds)


def _memory(table, place, text, most, pair=("v1", "v2")):
    scope, case, mode = place
    before, after = (table.get(scope, case, name, mode, "peak_bytes") for name in pair)
    if before is None or after is None:
        return Claim(text, "—", None)
    ratio = after.value / before.value
    figure = f"{_change(ratio)}: {after.value / 1e6:.1f} MB instead of {before.value / 1e6:.1f} MB ({case})"
    return Claim(text, figure, ratio <= most)


def _speed(table, place, text, least, pair=("v1", "v2")):
    scope, case, mode = place
    before, after = (table.get(scope, case, name, mode, "time_ms") for name in pair)
    if before is None or after is None:
        return Claim(text, "—", None)
    ratio = paired_ratio(before.samples, after.samples)
    spread = f"{ratio.p20:.2f}–{ratio.p80:.2f}"
    figure = f"{_change(ratio.median)}: {ratio.median:.2f} times as fast, 20th to 80th percentile {spread} ({case})"
    return Claim(text, figure, ratio.median >= least)


def _change(ratio):
    return f"{ratio - 1:+.0%}".replace("-", "−")


def _equality(outcome, epsilon):
    text = "outputs and gradients equal where the topologies are made equal"
    if not outcome.differences:
        return Claim(text, "—", None)
    worst = max(outcome.differences, key=lambda difference: difference.worst)
    place = f"{worst.provider}, {worst.scope}, {worst.case}"
    figure = f"largest relative difference {worst.worst:.1e} ({place})"
    return Claim(text, figure, worst.worst <= EQUAL * epsilon and not outcome.wrong)
