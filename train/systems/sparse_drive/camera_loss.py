"""What driving loses with a camera, and what completion gives back: the table over all tasks."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....modules.topology import Topology
from ...record import markdown, spread
from ...run import SavedRun
from .baselines import one_by_one
from .evaluate import Fault, evaluate_driving
from .experiment import CompletedExperiment, DriveExperiment

# Figure → whether more is better.
FIGURES = {
    "mAP": True,
    "NDS": True,
    "tracking/AMOTA": True,
    "map/mAP": True,
    "motion/minADE/car": False,
    "motion/minFDE/car": False,
    "plan/L2/mean": False,
    "plan/collision/mean": False,
}
NOTHING = "no loss"
ANY = "one camera, mean"  # over all single cameras, which one measurement of one camera is too noisy to tell
TOLD = 0.05  # share of a figure that a loss must cost, below which nothing can be told of what is recovered
BLACK, HIDDEN = "zeros", "hidden"  # methods of a model without completion


@dataclass(frozen=True)
class Cell:
    """The figures of one run with one method in one scenario."""

    method: str
    seed: int
    scenario: str
    figures: dict[str, float]


def scenarios(cameras: Sequence[str], pairs: bool = True, lasting: int = 0) -> dict[str, Fault]:
    """Nobody, each camera and, with `pairs`, each pair of neighbours missing, by name; `lasting` as of `Fault`."""
    found = {NOTHING: Fault(())} | {name: Fault((name,), lasting) for name in cameras}
    if pairs:
        attends = Topology.named("neighbours", cameras).attends
        both = [(a, b) for i, a in enumerate(cameras) for b in cameras[i + 1 :] if b in attends[a]]
        found |= {f"{a} + {b}": Fault((a, b), lasting) for a, b in both}
    return found


def methods(run: SavedRun) -> dict[str, bool]:
    """The methods by which a run copes with a loss → `Fault.hide`: its own completion, else black images and images
    that the head does not look at."""
    if isinstance(run.settings, CompletedExperiment):
        return {run.settings.name: True}
    return {BLACK: False, HIDDEN: True}


def measure(
    runs: Sequence[SavedRun],
    which: dict[str, Fault],
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Evaluates every run in every scenario, on the validation split.

    Raises:
        ValueError: a run is of another system.
    """
    cells = []
    for run in runs:
        if not isinstance(run.settings, DriveExperiment):
            raise ValueError(f"{run.path} is of {run.settings.name}; needs a run of sparse_drive")
        model, (_, validation) = run.build_model(device), run.settings.build_data()
        batches = _Again(lambda validation=validation: (b.to(device) for b in one_by_one(validation)))
        for method, hide in methods(run).items():
            for name, fault in which.items():
                progress(f"{run.settings.name}, seed {run.settings.run.seed}: {method}, {name}")
                see = Fault(fault.cameras, fault.lasting, hide)
                figures = evaluate_driving(run.settings, model, batches, see, measured=False)
                kept = {figure: figures[figure] for figure in FIGURES if figure in figures}
                cells.append(Cell(method, run.settings.run.seed, name, kept))
    return cells


class _Again:
    def __init__(self, make):
        self._make = make

    def __iter__(self):
        return self._make()


def values(cells: Sequence[Cell], method: str, scenario: str, figure: str) -> list[float]:
    """One figure of every seed; of `ANY` the mean over the single cameras."""
    chosen = [cell for cell in cells if cell.method == method and figure in cell.figures]
    if scenario != ANY:
        return [cell.figures[figure] for cell in chosen if cell.scenario == scenario]
    single = [cell for cell in chosen if cell.scenario != NOTHING and " + " not in cell.scenario]
    seeds = dict.fromkeys(cell.seed for cell in single)
    return [statistics.mean(cell.figures[figure] for cell in single if cell.seed == seed) for seed in seeds]


def recovered(cells: Sequence[Cell], method: str, scenario: str, figure: str) -> float | None:
    """The share of what the loss costs with black images that a method gives back, by the means over the seeds; None
    where the loss costs less than `TOLD` of the figure or something was not measured."""
    whole, lost = (values(cells, BLACK, name, figure) for name in (NOTHING, scenario))
    found = values(cells, method, scenario, figure)
    if not (whole and lost and found):
        return None
    cost = statistics.mean(whole) - statistics.mean(lost)
    if abs(cost) <= TOLD * abs(statistics.mean(whole)) or (cost > 0) != FIGURES[figure]:
        return None
    return (statistics.mean(found) - statistics.mean(lost)) / cost


def table(cells: Sequence[Cell], figure: str) -> list[list[str]]:
    """Rows for the scenarios: every method's figure, with the spread over seeds, and the share it recovers."""
    names = list(dict.fromkeys(cell.method for cell in cells))
    rows = [["missing", *names, *(f"{name} recovers" for name in names if name != BLACK)]]
    for scenario in [*dict.fromkeys(cell.scenario for cell in cells), ANY]:
        found = [values(cells, name, scenario, figure) for name in names]
        shares = [recovered(cells, name, scenario, figure) for name in names if name != BLACK]
        text = ["n/a" if share is None or scenario == NOTHING else f"{share:.0%}" for share in shares]
        rows.append([scenario, *(spread(each) if each else "n/a" for each in found), *text])
    return rows


def report(cells: Sequence[Cell], lasting: int) -> str:
    """Markdown: a table for each figure that was measured."""
    seeds = sorted({cell.seed for cell in cells})
    lasts = f"for {lasting} moments, then back for as many" if lasting else "for the whole drive"
    text = [
        "# What the loss of a camera costs, and what completion gives back\n",
        f"A missing camera is missing {lasts}. {BLACK}: the head looks at black images; {HIDDEN}: it does not look at "
        f"them. The share recovered is of what {BLACK} lose; n/a where they lose less than {TOLD:.0%} of the figure. "
        f"Seeds: {', '.join(map(str, seeds))}{'' if len(seeds) > 2 else ' (too few to tell small differences)'}.\n",
    ]
    for figure, larger in FIGURES.items():
        if any(figure in cell.figures for cell in cells):
            text += [f"## {figure}, {'larger' if larger else 'smaller'} is better\n", markdown(table(cells, figure))]
    return "\n".join(text)
