"""Copies of nuScenes roots to damage: tables and maps are the copy's own, pictures and scans are links."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

VERSION = "v1.0-mini"


def copy_root(source: Path, target: Path) -> Path:
    for folder in (VERSION, "maps"):
        shutil.copytree(source / folder, target / folder)
    for file in (path for part in ("samples", "sweeps") for path in (source / part).rglob("*") if path.is_file()):
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o700)
    return target


def read_table(root: Path, table: str) -> list[dict]:
    return json.loads((root / VERSION / f"{table}.json").read_text())


def edit(root: Path, table: str, change: Callable[[list[dict]], list[dict] | None]) -> None:
    """Rewrites a table: `change` edits its rows in place, or returns others."""
    rows = read_table(root, table)
    changed = change(rows)
    (root / VERSION / f"{table}.json").write_text(json.dumps(rows if changed is None else changed))


def without_channels(root: Path, *channels: str) -> None:
    """Removes sensors from every table."""
    sensors = {row["token"] for row in read_table(root, "sensor") if row["channel"] in channels}
    mounted = {row["token"] for row in read_table(root, "calibrated_sensor") if row["sensor_token"] in sensors}
    edit(root, "sensor", lambda rows: [row for row in rows if row["token"] not in sensors])
    edit(root, "calibrated_sensor", lambda rows: [row for row in rows if row["token"] not in mounted])
    edit(root, "sample_data", lambda rows: [row for row in rows if row["calibrated_sensor_token"] not in mounted])
