"""Pictures for the report: time and memory against size, one line a provider; the rig; warped history."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..modules.drawing import draw_rig
from ..train.data import Drive
from ..train.data.warp_picture import draw_warps
from .geometry import rig_of, topology_of
from .report import scope_name
from .results import Outcome, Row
from .workload import MODE_NAMES

_AXES = dict(cells="cells of a feature map", moments="moments of history", batch="batch", missing="missing cameras")
_METRICS = dict(time_ms=("time", "ms", 1), peak_bytes=("peak memory", "MB", 1e6))
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # told apart by everyone
_MARKERS = "osD^vPX"


def draw(outcome: Outcome, folder: Path) -> list[str]:
    """Writes a picture for each scope and axis on which at least two cases lie; returns their names."""
    names = []
    scopes = dict.fromkeys(scope for scope, _ in outcome.sizes)
    for scope in scopes:
        sizes = {case: axes for (its_scope, case), axes in outcome.sizes.items() if its_scope == scope}
        for axis in dict.fromkeys(axis for axes in sizes.values() for axis in axes):
            places = {case: axes[axis] for case, axes in sizes.items() if axis in axes}
            rows = [row for row in outcome.rows if row.scope == scope and row.case in places]
            if len({places[row.case] for row in rows}) < 2:
                continue
            scope_text = scope_name(rows[0])
            name = f"{scope_text}-{axis}.png"
            _figure(rows, places, scope_text, axis).savefig(folder / name, dpi=120)
            names.append(name)
    return names


def draw_geometry(drives: Sequence[Drive], folder: Path) -> list[str]:
    """Who attends to whom in V2; where there are images, also real history warped onto static objects."""
    title, rig = "V2: each camera and its neighbours", rig_of(drives)
    draw_rig(rig, topology_of("neighbours", rig), folder / "topology.png", title)
    views = draw_warps(drives, folder / "warp.png")
    return ["topology.png", "warp.png"] if views else ["topology.png"]


def _figure(rows: Sequence[Row], places: dict[str, float], scope: str, axis: str) -> Figure:
    modes = list(dict.fromkeys(row.mode for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows if row.metric == "time_ms"))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2 * len(modes)), layout="constrained")
        panels = figure.subplots(len(modes), 2, squeeze=False)
        for mode, pair in zip(modes, panels):
            for panel, (metric, (what, unit, scale)) in zip(pair, _METRICS.items()):
                for number, provider in enumerate(providers):
                    _line(panel, number, provider, rows, places, mode, metric, scale)
                panel.set_title(f"{scope}, {MODE_NAMES[mode]}: {what}")
                panel.set(xscale="log", yscale="log", xlabel=_AXES.get(axis, axis), ylabel=unit)
                _ticks(panel, sorted(set(places.values())))
        panels[0, 0].legend(frameon=False)
    return figure


def _ticks(panel, places):
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)


def _line(panel, number, provider, rows, places, mode, metric, scale):
    chosen = [row for row in rows if (row.provider, row.mode, row.metric) == (provider, mode, metric)]
    points = sorted(((places[row.case], row.summary) for row in chosen), key=lambda point: point[0])
    if not points:
        return
    x = [place for place, _ in points]
    style = dict(color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)], markersize=4)
    panel.plot(x, [spread.median / scale for _, spread in points], label=provider, **style)
    panel.fill_between(
        x, [s.p20 / scale for _, s in points], [s.p80 / scale for _, s in points], color=style["color"], alpha=0.15
    )
