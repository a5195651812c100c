"""A run's figure for each of the documents' claims, and what it says about the claim."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..train.claims import ABSENT, EQUAL, FAILS, HOLDS, KEYS, UNSURE, Claim
from .measure import median_interval, paired_ratios, summarise
from .results import Outcome, Table

ROUNDING = 256  # multiples of the dtype's epsilon within which results count as equal
WIDE = 1.5  # 80th over 20th percentile of a ratio, beyond which its median says little
CASE = "documents"  # the size that the claims were made for


@dataclass(frozen=True)
class Judged:
    """One claim, this run's figure, and the verdict. promised: the documents promise it; else they expect it."""

    text: str
    figure: str
    verdict: str
    promised: bool = True


@dataclass(frozen=True)
class Where:
    """Which measurements a claim is about. pair: the provider before and the one after."""

    scope: str
    case: str
    mode: str
    name: str  # for a person
    pair: tuple[str, str] = ("v1", "v2")


def claimed_case(cases: Sequence[str]) -> str:
    """The documents' size where it was measured, else the first case."""
    return CASE if CASE in cases else cases[0]


def judge_memory(claim: Claim, table: Table, where: Where) -> Judged:
    before, after = _pair(table, where, "peak_bytes")
    if before is None or after is None:
        return _absent(claim, where)
    ratio = after.value / before.value
    megabytes = f"{after.value / 1e6:.1f} MB instead of {before.value / 1e6:.1f} MB"
    return _judged(claim, where, f"{_change(ratio)}: {megabytes} ({where.case})", claim.verdict(ratio))


def judge_speed(claim: Claim, table: Table, where: Where) -> Judged:
    """Judges the interval in which the median ratio lies.

    Nothing is said of ratios that are all over the place, or of a machine that changed its speed meanwhile.
    """
    before, after = _pair(table, where, "time_ms")
    if before is None or after is None:
        return _absent(claim, where)
    ratios = paired_ratios(before.samples, after.samples)
    spread, verdict = summarise(ratios), claim.verdict(*median_interval(ratios))
    if spread.p80 > WIDE * spread.p20:
        verdict = UNSURE
    why = ", spread too wide" if verdict == UNSURE else ""
    if table.disturbed(where.scope, where.case, where.mode, "time_ms"):
        verdict, why = UNSURE, ", the machine changed its speed"
    figure = f"{_change(spread.median)}: {spread.median:.2f} times as fast"
    figure += f", 20th to 80th percentile {spread.p20:.2f}–{spread.p80:.2f} ({where.case}{why})"
    return _judged(claim, where, figure, verdict)


def judge_keys(outcome: Outcome, cases: Sequence[str]) -> Judged:
    """V2 attends to half of the keys, in every case."""
    case = claimed_case(cases)
    pairs = {c: (outcome.keys.get((c, "v2")), outcome.keys.get((c, "v1"))) for c in cases}
    if None in pairs[case]:
        return Judged(KEYS, "—", ABSENT)
    v2, v1 = pairs[case]
    holds = all(None in pair or 2 * pair[0] == pair[1] for pair in pairs.values())
    return Judged(KEYS, f"{v2:,} instead of {v1:,} ({case})", HOLDS if holds else FAILS)


def judge_equality(outcome: Outcome, epsilon: float) -> Judged:
    """Providers of one topology compute the same. epsilon: of the run's dtype."""
    if not outcome.differences:
        return Judged(EQUAL, "—", ABSENT)
    worst = max(outcome.differences, key=lambda difference: difference.worst)
    place = f"{worst.provider}, {worst.scope}, {worst.case}"
    holds = worst.worst <= ROUNDING * epsilon and not outcome.wrong
    return Judged(EQUAL, f"largest relative difference {worst.worst:.1e} ({place})", HOLDS if holds else FAILS)


def _pair(table, where, metric):
    return (table.get(where.scope, where.case, name, where.mode, metric) for name in where.pair)


def _absent(claim, where):
    return _judged(claim, where, "—", ABSENT)


def _judged(claim, where, figure, verdict):
    expected = "" if claim.promised else " expected"
    return Judged(f"{claim.text}{expected}, {where.name}", figure, verdict, claim.promised)


def _change(ratio):
    return f"{ratio - 1:+.0%}".replace("-", "−")
