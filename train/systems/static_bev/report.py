"""What static BEV says, in tables: lanes by sub-class, range and confidence, areas, instances; runs side by side."""

from collections.abc import Mapping
from statistics import fmean

from ...metrics.pooling import figure_text
from ...record import spread
from .evaluate import Measured
from .series import ANY, OTHER, RANGES

NO_LOSS = "no loss"
_COMPARED = ("iou", "iou_best", "series/f1", "series/f1_any", "ap/centre", "ap/iou50")


def report(measured: Measured) -> str:
    """One run without losses, as Markdown."""
    figures = measured.figures()
    parts = ["## Areas and lines, IoU pooled over the split", _areas(figures), "## Lanes, series evaluation"]
    parts += [_series(measured, place) for place in RANGES]
    return "\n\n".join([*parts, "## Instances, average precision", _instances(measured, figures)]) + "\n"


def comparison(cells: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """(run, lost cameras) → figures, as one table for each figure: a row for each loss, a column for each run.

    Runs whose names differ in a number behind a dash, the seed, share a column: their mean ± standard deviation. With
    two such columns of the same seeds a third has the second less the first, seed by seed. Behind several losses stands
    their mean.
    """
    losses = list(dict.fromkeys(lost for _, lost in cells))
    lost = [loss for loss in losses if loss != NO_LOSS]
    rows = {loss: [loss] for loss in losses} | ({"mean of the losses": lost} if len(lost) > 1 else {})
    kinds = _kinds(run for run, _ in cells)
    parts = []
    for name in _COMPARED:
        values = {
            (run, row): _mean([cells[run, loss].get(name) for loss in members])
            for run in dict.fromkeys(run for run, _ in cells)
            for row, members in rows.items()
        }
        rival = [figures.get(f"constant/{name}") for figures in cells.values()]
        rival = [value for value in rival if value is not None][:1]
        heads = [*kinds, *(["mean map"] if rival else [])]
        pair = [runs for runs in kinds.values() if len(runs) > 1]
        pair = pair if len(pair) == 2 and [*pair[0]] == [*pair[1]] else None
        table = [["camera lost now", *heads, *(["difference"] if pair else [])]]
        for row in rows:
            texts = [_spread([values[run, row] for run in runs.values()]) for runs in kinds.values()]
            texts += [figure_text(value) for value in rival]
            if pair:
                both = [(values[pair[0][seed], row], values[pair[1][seed], row]) for seed in pair[0]]
                texts.append(_spread([None if None in two else two[1] - two[0] for two in both], "{:+.4f}"))
            table.append([row, *texts])
        parts += [f"### {name}", _table(table)]
    return "\n\n".join(parts) + "\n"


def _kinds(runs):
    """Name without the seed → seed → name of the run, in order."""
    kinds = {}
    for run in runs:
        kind, dash, seed = run.rpartition("-")
        numbered = dash and seed.isdecimal()
        kinds.setdefault(kind if numbered else run, {})[seed if numbered else ""] = run
    return kinds


def _mean(values):
    return None if None in values else fmean(values)


def _spread(values, form="{:.4f}"):
    return figure_text(None) if None in values else spread(values, form)


def _areas(figures):
    names = [name.removeprefix("iou_best/") for name in figures if name.startswith("iou_best/")]
    rows = [["class", "at the fixed threshold", "at the best threshold"]]
    rows += [[n, figure_text(figures.get(f"iou/{n}")), figure_text(figures.get(f"iou_best/{n}"))] for n in names]
    for title, prefix in (("mean", ""), ("mean map of the training labels", "constant/")):
        rows.append([title, *(figure_text(figures.get(f"{prefix}{kind}")) for kind in ("iou", "iou_best"))])
    return _table(rows)


def _series(measured, place):
    """One range: support, then F1 at each confidence, and details at the lowest."""
    metric = measured.own.series
    figures, confidences = metric.figures(), metric.settings["confidences"]
    least = min(confidences)
    rows = [
        ["sub-class", "support, m", *(f"F1 at {c:g}" for c in confidences), "recall", "precision", "error, m", "type"]
    ]
    for name in metric.names:
        each = figures[name, place, least]
        if not each.support and name not in (ANY, OTHER):
            rows.append([name, "0", *["n/a"] * (len(confidences) + 4)])
            continue
        f1 = [figure_text(figures[name, place, c].f1, ".3f") for c in confidences]
        rest = [figure_text(value, ".3f") for value in (each.recall, each.precision, each.error, each.type_accuracy)]
        rows.append([name, f"{each.support:.0f}", *f1, *rest])
    return f"### {place}; recall, precision, error and type at {least:g}\n\n{_table(rows)}"


def _instances(measured, figures):
    metric = measured.own.instances
    rows = [["class", *metric.KINDS]]
    for name in metric.settings["classes"]:
        rows.append([name, *(figure_text(figures.get(f"ap/{kind}/{name}")) for kind in metric.KINDS)])
    return _table(rows)


def _table(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])
