"""What static BEV says, in tables: lanes by sub-class, range and confidence, areas, instances; runs side by side."""

from collections.abc import Mapping

from ...metrics.pooling import figure_text
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
    """(run, lost cameras) → figures, as one table for each figure: a row for each loss, a column for each run."""
    runs, losses = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    parts = []
    for name in _COMPARED:
        rival = f"constant/{name}"
        beside = [rival] if any(rival in figures for figures in cells.values()) else []
        rows = [["camera lost now", *runs, *(["mean map"] if beside else [])]]
        for loss in losses:
            values = [cells[run, loss].get(name) for run in runs]
            values += [cells[runs[0], loss].get(each) for each in beside]
            rows.append([loss, *map(figure_text, values)])
        parts += [f"### {name}", _table(rows)]
    return "\n\n".join(parts) + "\n"


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
