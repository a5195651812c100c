"""The tables of a nuScenes root, read and judged once: afterwards every link leads somewhere and every value is usable.

Each rule judges a whole column at once, since a full root has millions of rows; only the value that breaks a rule is
looked for one by one.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FARTHEST = 1e8  # metres from the origin of the map
_MOUNTED = 1e3  # metres from a sensor to the ego frame's origin
_NOT_UNIT = 0.01  # how far a quaternion's length may be from 1
_LARGEST = 65_535  # pixels of a side
_SINGULAR = 1e9  # condition of the intrinsics from where their inverse is worthless
_LATEST = 2**53  # microseconds; float64 holds them exactly


@dataclass(frozen=True)
class _Rule:
    """What a field must be, and whether a whole column of it is so."""

    need: str
    holds: Callable[[list], bool]


def read_tables(folder: str | Path) -> dict[str, list[dict]]:
    """The thirteen tables of a nuScenes version, by name.

    Fields that nothing reads are not judged.

    Args:
        folder: `<root>/<version>`.

    Raises:
        ValueError: a table is missing or is no list of rows, or a row has a field that is absent, of a wrong type, out
            of range, or leads nowhere, or breaks its chain; one line that names table, token and field.
    """
    tables = {name: read_rows(Path(folder), name) for name in _FIELDS}
    judged = _Tables(Path(folder), tables)
    for check in (judged.check_fields, judged.check_chains, judged.check_scenes, judged.check_cameras):
        check()
    judged.check_key_frames()
    judged.check_maps()
    return tables


def read_rows(folder: Path, name: str) -> list[dict]:
    """The rows of one table, unjudged but for being rows; errors as those of `read_tables`."""
    rows = read_json(folder / f"{name}.json")
    if type(rows) is not list or not set(map(type, rows)) <= {dict}:
        raise ValueError(f"{folder / name}.json needs a list of rows, one object each")
    return rows


def read_json(file: Path):
    """The content of a JSON file.

    Raises:
        ValueError: no such file, or no JSON in it; one line.
    """
    if not file.is_file():  # nor a pipe, which would be waited for
        raise ValueError(f"{file} is missing")
    try:
        with file.open(encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


class _Tables:
    def __init__(self, folder: Path, tables: Mapping[str, list[dict]]):
        self.folder, self.tables = folder, tables
        self.index = {}  # table → token → row number
        for name, rows in tables.items():
            self.judge(name, "token", _TEXT)
            self.index[name] = {token: number for number, token in enumerate(self.column(name, "token"))}
            if len(self.index[name]) < len(rows):
                last = next(i for i, row in enumerate(rows) if self.index[name][row["token"]] != i)
                self.refuse(name, last, "token", "one row of its own")

    def column(self, table: str, field: str) -> list:
        rows = self.tables[table]
        try:
            return [row[field] for row in rows]
        except KeyError:
            number = next(i for i, row in enumerate(rows) if field not in row)
            raise ValueError(f"{self._row(table, number)} has no field {field!r}") from None

    def numbers(self, table: str, field: str) -> np.ndarray:
        return np.array(self.column(table, field), dtype=np.float64)

    def places(self, table: str, field: str, other: str) -> np.ndarray:
        """(N,) the rows of `other` that a column of tokens names, −1 = none."""
        known = self.index[other]
        column = self.column(table, field)
        return np.fromiter((known.get(token, -1) for token in column), dtype=np.int64, count=len(column))

    def judge(self, table: str, field: str, rule: _Rule) -> None:
        column = self.column(table, field)
        if column and not rule.holds(column):
            number = next(i for i, value in enumerate(column) if not rule.holds([value]))
            self.refuse(table, number, field, rule.need)

    def require(self, table: str, field: str, good: np.ndarray, need: str, rows: np.ndarray | None = None) -> None:
        """Refuses the first row of a table (or of its `rows`) that is not `good`."""
        if not good.all():
            number = int(np.argmin(good))
            self.refuse(table, number if rows is None else int(rows[number]), field, need)

    def refuse(self, table: str, number: int, field: str, need: str):
        value = repr(self.tables[table][number][field])
        value = value if len(value) <= 80 else f"{value[:77]}..."
        raise ValueError(f"{self._row(table, number)}: {field} is {value}, needs {need}")

    def _row(self, table, number):
        token = self.tables[table][number].get("token")
        named = type(token) is str and token.isprintable() and 0 < len(token) <= 64
        return f"{self.folder}: {table} {token if named else f'row {number}'}"

    def check_fields(self) -> None:
        for table, fields in _FIELDS.items():
            for field, rule in fields.items():
                self.judge(table, field, rule if isinstance(rule, _Rule) else rule(self.index))

    def check_chains(self) -> None:
        """`next` and `prev` answer each other, stay with their owner and follow time, so no chain is a ring."""
        sensor = self.places("calibrated_sensor", "sensor_token", "sensor")
        time = self.numbers("sample", "timestamp")
        at_sample = self.places("sample_annotation", "sample_token", "sample")
        self._check_chain("sample", self.places("sample", "scene_token", "scene"), time, "scene")
        owner = sensor[self.places("sample_data", "calibrated_sensor_token", "calibrated_sensor")]
        self._check_chain("sample_data", owner, self.numbers("sample_data", "timestamp"), "sensor")
        owner = self.places("sample_annotation", "instance_token", "instance")
        self._check_chain("sample_annotation", owner, time[at_sample], "instance")

    def _check_chain(self, table, owner, time, whose):
        after, before = self.places(table, "next", table), self.places(table, "prev", table)
        for field, step, back, later in (("next", after, before, 1), ("prev", before, after, -1)):
            rows = np.flatnonzero(step >= 0)
            there = step[rows]
            self.require(table, field, back[there] == rows, "a row that leads back here", rows)
            self.require(table, field, owner[there] == owner[rows], f"a row of the same {whose}", rows)
            need = f"a row of a {'later' if later > 0 else 'earlier'} time"
            self.require(table, field, later * (time[there] - time[rows]) > 0, need, rows)

    def check_scenes(self) -> None:
        """The samples of a scene are one chain, from the first that the scene names to the last."""
        names = self.column("scene", "name")
        last_of = {name: number for number, name in enumerate(names)}
        alone = np.array([last_of[name] == number for number, name in enumerate(names)], dtype=bool)
        self.require("scene", "name", alone, "a name that no other scene has")
        scene = self.places("sample", "scene_token", "scene")
        own = np.arange(len(names))
        for field, end in (("first_sample_token", "prev"), ("last_sample_token", "next")):
            sample = self.places("scene", field, "sample")
            ends = self.places("sample", end, "sample") < 0
            self.require("scene", field, scene[sample] == own, "a sample of this scene")
            self.require("scene", field, ends[sample], f"a sample without {end}")
            named = np.isin(np.arange(len(scene)), sample)
            self.require("sample", end, named | ~ends, f"a sample, or to be the scene's {field}")

    def check_cameras(self) -> None:
        is_camera = np.array([row["modality"] == "camera" for row in self.tables["sensor"]], dtype=bool)
        calibrated = is_camera[self.places("calibrated_sensor", "sensor_token", "sensor")]
        images = np.flatnonzero(self.calibration_of_data(calibrated))
        for table, fields, rows in (
            ("calibrated_sensor", {"camera_intrinsic": _INTRINSICS}, np.flatnonzero(calibrated)),
            ("sample_data", {"width": _SIDE, "height": _SIDE}, images),
        ):
            for field, rule in fields.items():
                column = self.column(table, field)
                chosen = [column[row] for row in rows]
                if chosen and not rule.holds(chosen):
                    self.refuse(table, next(row for row in rows if not rule.holds([column[row]])), field, rule.need)

    def calibration_of_data(self, values: np.ndarray) -> np.ndarray:
        return values[self.places("sample_data", "calibrated_sensor_token", "calibrated_sensor")]

    def check_key_frames(self) -> None:
        """Each sample has a key frame, and never two of one sensor."""
        sensor = self.calibration_of_data(self.places("calibrated_sensor", "sensor_token", "sensor"))
        key = np.flatnonzero(np.array(self.column("sample_data", "is_key_frame"), dtype=bool))
        sample = self.places("sample_data", "sample_token", "sample")[key]
        both = sample * (len(self.tables["sensor"]) + 1) + sensor[key]
        first = np.zeros(len(key), dtype=bool)
        first[np.unique(both, return_index=True)[1]] = True
        self.require("sample_data", "sample_token", first, "a sample without a key frame of this sensor", key)
        served = np.isin(np.arange(len(self.tables["sample"])), sample)
        self.require("sample", "token", served, "a row of sample_data that is its key frame")

    def check_maps(self) -> None:
        """Every log has a map: the devkit cannot open a root otherwise."""
        mapped = {token for row in self.tables["map"] for token in row["log_tokens"]}
        covered = np.array([row["token"] in mapped for row in self.tables["log"]], dtype=bool)
        self.require("log", "token", covered, "a row of map whose log_tokens have it")
        if not self.tables["map"]:
            raise ValueError(f"{self.folder}: map has no row, needs one")


def _types(column: list) -> set[type]:
    return set(map(type, column))


def _link(table: str, optional: bool = False):
    def rule(index: Mapping[str, Collection]) -> _Rule:
        known, allowed = index[table], {""} if optional else set()

        def holds(column):
            return _types(column) <= {str} and {token for token in column if token not in known} <= allowed

        return _Rule(f"the token of a {table}{', or an empty one' if optional else ''}", holds)

    return rule


def _links(table: str):
    def rule(index: Mapping[str, Collection]) -> _Rule:
        one = _link(table)(index)

        def holds(column):
            return _types(column) <= {list} and one.holds([token for tokens in column for token in tokens])

        return _Rule(f"a list of tokens of {table}", holds)

    return rule


def _numbers(low: float, high: float, need: str, *shape: int, whole: bool = False) -> _Rule:
    """Finite numbers, or arrays of `shape`, from `low` to `high`."""

    def holds(column):
        if not shape and not _types(column) <= ({int} if whole else {int, float}):
            return False
        values = _array(column, shape)
        return values is not None and bool(((values >= low) & (values <= high)).all())

    return _Rule(need, holds)


def _array(column, shape):
    """(N, *shape) float64; None where the column holds anything else."""
    try:
        values = np.array(column)
    except ValueError:  # rows of several lengths
        return None
    return values.astype(np.float64) if values.dtype.kind in "iuf" and values.shape[1:] == shape else None


def _unit(column) -> bool:
    values = _array(column, (4,))
    return values is not None and bool((np.abs(np.linalg.norm(values, axis=1) - 1) <= _NOT_UNIT).all())


def _invertible(column) -> bool:
    values = _array(column, (3, 3))
    if values is None or not np.isfinite(values).all() or (values[:, 2] != [0, 0, 1]).any():
        return False
    focal = values[:, [0, 1], [0, 1]]
    return bool((focal > 0).all() and (np.linalg.cond(values) < _SINGULAR).all())


def _is_inside(name) -> bool:
    """Judged by the name alone: a link inside the root may lead where its owner likes."""
    if type(name) is not str or not name.isprintable() or not 0 < len(name.encode()) <= 255:
        return False
    return not name.startswith("/") and "\\" not in name and ".." not in name.split("/")


_TEXT = _Rule("a text", lambda column: _types(column) <= {str} and all(column))
_TEXTS = _Rule(  # those of a map may name logs of other versions
    "a list of texts", lambda column: _types(column) <= {list} and all(_types(texts) <= {str} for texts in column)
)
_FLAG = _Rule("true or false", lambda column: _types(column) <= {bool})
_COUNT = _numbers(0, 2**53, "a whole number, 0 or more", whole=True)
_TIME = _numbers(1, _LATEST, "microseconds, a positive whole number", whole=True)
_SIDE = _numbers(1, _LARGEST, f"1 to {_LARGEST} pixels", whole=True)
_SIZE = _numbers(1e-6, _MOUNTED, f"three lengths above 0, up to {_MOUNTED:.0f} m", 3)
_PLACE = _numbers(-_FARTHEST, _FARTHEST, f"three finite numbers of at most {_FARTHEST:.0e} m", 3)
_MOUNTING = _numbers(-_MOUNTED, _MOUNTED, f"three finite numbers of at most {_MOUNTED:.0f} m", 3)
_ROTATION = _Rule("a unit quaternion of four finite numbers", _unit)
_INTRINSICS = _Rule("a 3 × 3 invertible matrix, focal lengths above 0, last row 0, 0, 1", _invertible)
_FILE = _Rule("the name of a file that stays in the root", lambda column: all(map(_is_inside, column)))
_NAME = _Rule("a plain name", lambda column: all(_is_inside(name) and "/" not in name for name in column))
_MODALITY = _Rule(
    "camera, lidar or radar",
    lambda column: _types(column) <= {str} and set(column) <= {"camera", "lidar", "radar"},
)
_CHAIN = ("prev", "next")

# What is read of each table, and the rule for it: some need to know which tokens there are.
_FIELDS = {
    "category": {"name": _TEXT},
    "attribute": {"name": _TEXT},
    "visibility": {},
    "instance": {
        "category_token": _link("category"),
        "first_annotation_token": _link("sample_annotation"),
        "last_annotation_token": _link("sample_annotation"),
    },
    "sensor": {"channel": _NAME, "modality": _MODALITY},
    "calibrated_sensor": {"sensor_token": _link("sensor"), "translation": _MOUNTING, "rotation": _ROTATION},
    "ego_pose": {"translation": _PLACE, "rotation": _ROTATION},
    "log": {"location": _NAME},
    "scene": {
        "name": _NAME,
        "log_token": _link("log"),
        "first_sample_token": _link("sample"),
        "last_sample_token": _link("sample"),
    },
    "sample": {"timestamp": _TIME, "scene_token": _link("scene")} | dict.fromkeys(_CHAIN, _link("sample", True)),
    "sample_data": {
        "sample_token": _link("sample"),
        "ego_pose_token": _link("ego_pose"),
        "calibrated_sensor_token": _link("calibrated_sensor"),
        "timestamp": _TIME,
        "is_key_frame": _FLAG,
        "filename": _FILE,
    }
    | dict.fromkeys(_CHAIN, _link("sample_data", True)),
    "sample_annotation": {
        "sample_token": _link("sample"),
        "instance_token": _link("instance"),
        "attribute_tokens": _links("attribute"),
        "translation": _PLACE,
        "size": _SIZE,
        "rotation": _ROTATION,
        "num_lidar_pts": _COUNT,
        "num_radar_pts": _COUNT,
    }
    | dict.fromkeys(_CHAIN, _link("sample_annotation", True)),
    "map": {"filename": _FILE, "log_tokens": _TEXTS},
}
