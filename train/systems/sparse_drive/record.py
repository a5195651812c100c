"""What the record of driving runs has besides what every record has: a block for each task, and verdicts."""

import math
import statistics
from collections.abc import Sequence

from ...claims import ACCURACY, FAILS, HOLDS, RUN_MEMORY, RUN_SPEED, UNSURE
from ...record import Run, by_config, markdown, spread

# Block of the documents' template → its figures, and whether more is better.
BLOCKS = {
    "Detection": {"mAP": True, "NDS": True},
    "Tracking": {"tracking/AMOTA": True, "tracking/AMOTP": False},
    "Mapping": {
        "map/mAP": True,
        "map/AP/ped_crossing": True,
        "map/AP/divider": True,
        "map/AP/boundary": True,
    },
    "Motion": {
        "motion/minADE/car": False,
        "motion/minFDE/car": False,
        "motion/miss_rate/car": False,
        "motion/EPA/car": True,
        "motion/minADE/pedestrian": False,
    },
    "Planning": {"plan/L2/mean": False, "plan/L2/endpoint": False, "plan/collision/mean": False},
}
JUDGED = ("mAP", "tracking/AMOTA", "map/mAP", "motion/minADE/car", "plan/L2/mean")  # the documents' "within 1 %"
SEEDS = 3  # of each configuration, below which there is no verdict
_RIVALS = ("standing still", "constant velocity", "follow the leader", "measured status")


def sections(runs: Sequence[Run]) -> list[str]:
    """See `train.record`: the figures of the best checkpoints by task, with all cameras and masked, and verdicts."""
    groups = by_config(runs)
    text = []
    for block, figures in BLOCKS.items():
        rows = [["figure", *groups], *_rows(groups, figures)]
        if block == "Planning":
            rivals = [f"plan/{name}/{figure}" for name in _RIVALS for figure in ("L2/mean", "collision/mean")]
            rows += _rows(groups, rivals)
        rows += _rows(groups, [f"masked/{name}" for name in figures])
        text.append(f"## {block}\n\n{markdown(rows) if len(rows) > 1 else 'Not measured.'}\n")
    judged = verdicts(groups)
    if len(judged) > 1:
        text += ["## Driving with completion: verdicts\n", markdown(judged)]
    return text


def _rows(groups, names):
    """A row for each figure that some run has: means over the seeds, with their spread."""
    rows = []
    for name in names:
        found = [_values(runs, name) for runs in groups.values()]
        if any(found):
            rows.append([name, *(spread(values, "{:.4f}") for values in found)])
    return rows


def _values(runs, name):
    return [run.best[name] for run in runs if not math.isnan(run.best.get(name, math.nan))]


def verdicts(groups: dict[str, list[Run]]) -> list[list[str]]:
    """Each claim about V2 and V3 against V1, where both were run; the figures are those with all cameras and masked."""
    rows = [["claim", "figure", "verdict"]]
    pairs = [(n, n.replace(v, "v1")) for v in ("v2", "v3") for n in groups if v in n and n.replace(v, "v1") in groups]
    larger = {name: better for figures in BLOCKS.values() for name, better in figures.items()}
    for ours, first in pairs:
        for claim, what in ((RUN_SPEED, "speed"), (RUN_MEMORY, "memory")):
            means = [statistics.mean(getattr(run, what) for run in groups[name]) for name in (ours, first)]
            ratio = means[0] / means[1]
            rows.append([f"{ours}: {claim.text}, a whole run", f"× {ratio:.2f}", claim.verdict(ratio)])
        for name in (*JUDGED, *(f"masked/{name}" for name in JUDGED)):
            found = [_values(groups[group], name) for group in (first, ours)]
            if all(found):
                text = f"{spread(found[1], '{:.4f}')} against {spread(found[0], '{:.4f}')}"
                rows.append([f"{ours}: {name} within 1 % of V1's", text, within(*found, larger[_plain(name)])])
    return rows


def _plain(name):
    return name.removeprefix("masked/")


def within(before: Sequence[float], now: Sequence[float], larger: bool) -> str:
    """Whether a figure is at most 1 % worse than before.

    Twice the standard error of the difference of the means is what noise may do; a verdict needs `SEEDS` of each.
    """
    if min(len(before), len(now)) < SEEDS:
        return UNSURE
    worse = (statistics.mean(before) - statistics.mean(now)) * (1 if larger else -1)
    noise = 2 * math.sqrt(sum(statistics.variance(values) / len(values) for values in (before, now)))
    allowed = ACCURACY * abs(statistics.mean(before))
    return HOLDS if worse + noise <= allowed else FAILS if worse - noise > allowed else UNSURE
