"""The tables of the documents' planned experiments: what is trained for each, and what it says.

A table has rows, each a configuration with a change, trained with several seeds; or it looks at the same runs in other
scenarios.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ....modules.rig import NUSCENES_CAMERAS
from ....modules.topology import Topology
from ...config import apply_options, check, diff, to_dict
from ...distributed import World
from ...log import machine
from ...record import RecordOptions, load_run, markdown, spread
from ...trainer import Trainer
from .. import experiment
from .evaluate import BASELINES, LOST, Scenario
from .record import CompletionRun, score_run


@dataclass(frozen=True)
class Row:
    """What is trained: a configuration by name (its tiny sibling or itself), and settings that are changed."""

    label: str
    config: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows, and the scenarios that each is judged in, by name of the column."""

    about: str
    rows: tuple[Row, ...]
    columns: dict[str, tuple[Scenario, ...]]
    baselines: tuple[str, ...] = ("constant", "copy", "warp")  # rows that need no training


_SINGLE = tuple(Scenario(name, (name,)) for name in NUSCENES_CAMERAS)
_ONE = {"one of six missing": _SINGLE}


def _together(count: int) -> tuple[Scenario, ...]:
    """Every `count` cameras that stand side by side round the car."""
    after = {name: others for name, (_, *others) in Topology.named("neighbours").attends.items()}
    ring = ["CAM_FRONT", "CAM_FRONT_LEFT"]
    while len(ring) < len(after):
        ring.append(next(name for name in after[ring[-1]] if name not in ring))
    groups = [tuple(ring[(first + step) % len(ring)] for step in range(count)) for first in range(len(ring))]
    return tuple(Scenario(" + ".join(group), group) for group in groups)


def _lost(count: int) -> tuple[Scenario, ...]:
    return tuple(Scenario(f"{name}, {count} lost", (name,), count) for name in NUSCENES_CAMERAS)


_VERSIONS = (Row("V1", "completion_v1"), Row("V2", "completion_v2"), Row("V3", "completion_v3"))
_NO_VAE = ("model.vae.enable=false",)
TABLES = {
    "missing": Table(
        "how many of six cameras are missing, side by side",
        _VERSIONS,
        {f"{count} of 6": _together(count) for count in (1, 2, 3)},
    ),
    "filling": Table(
        "how a missing camera is filled",
        (
            Row("VAE alone", "completion_v2_no_temporal"),
            Row("temporal without motion", "completion_v2", (*_NO_VAE, "model.temporal.motion=false")),
            Row("temporal", "completion_v2", _NO_VAE),
            Row("temporal + VAE (V2)", "completion_v2"),
            Row("temporal + VAE + stage 3", "completion_v2_planning"),
            Row("temporal + stage 3, VAE in training alone", "completion_v2_documents"),
            Row("side by side", "completion_v2_parallel"),
            Row("V3", "completion_v3"),
        ),
        _ONE,
        BASELINES,
    ),
    "warp": Table(
        "what is moved, and how",
        (
            Row("no warp", "completion_v2", ("model.temporal.motion=false", "model.temporal.max_offset=0")),
            Row("one depth, 10 m", "completion_v2", ("model.temporal.depths=10", "model.temporal.max_offset=0")),
            Row("several depths", "completion_v2", ("model.temporal.max_offset=0",)),
            Row("several depths, offsets", "completion_v2"),
            Row("V3", "completion_v3"),
        ),
        _ONE,
    ),
    "history": Table(
        "moments of history",
        (
            Row("0", "completion_v2_no_temporal"),
            *(
                Row(str(count), "completion_v2", (f"model.temporal.queue_length={count}", f"data.history={count}"))
                for count in (1, 3)
            ),
            Row("as many as the configuration has", "completion_v2"),
        ),
        _ONE,
    ),
    "topology": Table(
        "whom a missing camera looks at",
        (
            Row("itself", "completion_own"),
            Row("itself and its neighbours (V2)", "completion_v2"),
            Row("all (V1)", "completion_v1"),
        ),
        _ONE,
    ),
    "trajectory": Table(
        "which trajectory guides stage 3",
        (
            Row("none", "completion_v2_unguided"),
            Row("predicted", "completion_v2_predicted"),
            Row("ground truth, in training alone", "completion_v2_planning"),
        ),
        _ONE,
    ),
    "duration": Table(
        "moments for which a camera was missing before, and a drive that begins without it",
        _VERSIONS,
        {"only now": _SINGLE}
        | {f"{count} before": _lost(count) for count in LOST[:2]}
        | {"from the start": _lost(1000)}
        | {"no history": tuple(Scenario(f"{s.name}, alone", s.cameras, history=False) for s in _SINGLE)},
    ),
}


def train_row(row: Row, folder: Path, seed: int, data: str, tiny: bool, options: Sequence[str], world: World) -> None:
    """Trains a row with one seed, unless its folder has a finished run.

    Raises:
        ValueError: settings that cannot be, or a finished run has others. TrainingError, OSError: see `Trainer`.
    """
    settings = experiment(f"{row.config}_tiny" if tiny else row.config)
    settings.data.root, settings.run.seed = data, seed
    apply_options(settings, (*row.options, *options))
    if settings.model.temporal.enable and not any("queue_length" in option for option in row.options):
        settings.model.temporal.queue_length = settings.data.history
    check(settings)
    if not (folder / "result.json").is_file():
        Trainer(settings, folder, world).fit()
        return
    changed = diff(json.loads((folder / "config.json").read_text()), to_dict(settings))
    if changed:
        raise ValueError(f"{folder} was trained with other settings ({changed[0]}); --out takes another folder")


@dataclass(frozen=True)
class Line:
    """A row of a table as it was measured: for each seed. A baseline's speed and memory are empty."""

    label: str
    explained: dict[str, list[float]]  # of each column, about the constant, mean over its scenarios and the scales
    relative_l2: dict[str, list[float]]
    speed: list[float]  # training steps per second
    memory: list[float]  # peak MiB


def score_table(table: Table, folders: dict[str, list[Path]], options: RecordOptions) -> list[Line]:
    """Evaluates the runs: the baselines over all of them, then each row.

    Args:
        folders: label → a run's folder for each seed.
    """
    which = [scenario for column in table.columns.values() for scenario in column]
    runs = {label: [score_run(load_run(path), options, which) for path in paths] for label, paths in folders.items()}
    everyone = [run for group in runs.values() for run in group]
    lines = [_line(table, method, everyone, method) for method in table.baselines]
    return lines + [_line(table, label, group, "completed") for label, group in runs.items()]


def _line(table, label, runs: Sequence[CompletionRun], method: str) -> Line:
    def means(figure):
        return {
            name: [statistics.mean(run.figure(s.name, method, figure) for s in column) for run in runs]
            for name, column in table.columns.items()
        }

    trained = runs if method == "completed" else ()
    return Line(
        label, means("explained"), means("relative_l2"), [run.speed for run in trained], [run.memory for run in trained]
    )


def table_rows(lines: Sequence[Line]) -> list[list[str]]:
    """Label × column, variance explained about the constant and relative L2, means with the spread over seeds; then
    training speed and peak memory of the run."""
    columns = list(lines[0].explained)
    rows = [
        ["", *(f"{column}: {name}" for column in columns for name in ("explained", "relative L2")), "it/s", "peak MiB"]
    ]
    for line in lines:
        cells = [
            spread(values[column], form)
            for column in columns
            for values, form in ((line.explained, "{:+.3f}"), (line.relative_l2, "{:.3f}"))
        ]
        rows.append([line.label, *cells, spread(line.speed, "{:.2f}"), spread(line.memory, "{:.0f}")])
    return rows


def make_table(
    name: str,
    out: Path,
    options: RecordOptions,
    *,
    data: str,
    seeds: int,
    tiny: bool,
    settings: Sequence[str],
    progress: Callable[[str], None],
) -> str:
    """Trains what the table `name` needs into `out` and returns it in Markdown; what is trained already is taken.

    The table is written to NAME.md, and what it was measured from, seed by seed, to NAME.json.
    """
    table, folders = TABLES[name], {}
    for row in table.rows:
        for seed in range(seeds):
            progress(f"{row.label}, seed {seed}")
            place = "-".join((row.config, *(option.replace("model.", "") for option in row.options)))
            folder = out / "runs" / f"{place}-{seed}"
            train_row(row, folder, seed, data, tiny, settings, World(device=options.device))
            folders.setdefault(row.label, []).append(folder)
    lines = score_table(table, folders, options)
    text = f"# {name}: {table.about}\n\n{markdown(table_rows(lines))}"
    facts = dict(table=name, about=table.about, seeds=seeds, windows=options.windows, settings=list(settings))
    facts |= dict(data=Path(data).name, machine=machine(options.device), rows=[asdict(line) for line in lines])
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return text
