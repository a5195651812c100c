"""The tables of the planned experiments: every row can be built, and a command makes one."""

import json

import pytest
import torch

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion.tables import TABLES
from rigfuse.train.tools import completion_tables

ROWS = {(row.config, row.options) for table in TABLES.values() for row in table.rows}


@pytest.mark.parametrize("config, options", sorted(ROWS))
def test_every_row_is_an_experiment(config, options):
    for name in (config, f"{config}_tiny"):
        check(apply_options(experiment(name), options))
    apply_options(experiment(f"{config}_tiny"), options).build_model()


def test_scenarios_are_of_cameras_side_by_side_and_have_names_of_their_own():
    for table in TABLES.values():
        named = [scenario for column in table.columns.values() for scenario in column]
        assert len({s.name for s in named}) == len(named)
    for count, column in zip((1, 2, 3), TABLES["missing"].columns.values()):
        assert len(column) == 6 and {len(set(s.cameras)) for s in column} == {count}
        assert {camera for s in column for camera in s.cameras} == set(NUSCENES_CAMERAS)
    pairs = {frozenset(s.cameras) for s in TABLES["missing"].columns["2 of 6"]}
    assert frozenset(("CAM_BACK_LEFT", "CAM_BACK")) in pairs and frozenset(("CAM_FRONT", "CAM_BACK")) not in pairs


def test_the_command_trains_what_is_missing_and_writes_the_table(small_world, tmp_path, capsys):
    quick = (
        "data.image_size=32,64",
        "data.history=1",
        "run.epochs=1",
        "run.tensorboard=false",
        "run.evaluate_epochs=9",
    )
    quick += ("loader.batch_size=1", "constant_samples=2", "evaluate_without=CAM_FRONT", "run.log_steps=1")
    arguments = ["topology", "--data", str(small_world), "--out", str(tmp_path), "--seeds", "1", "--windows", "1"]
    assert completion_tables.main([*arguments, "--cfg-options", *quick]) == 0
    shown = capsys.readouterr().out
    (text,) = [path.read_text() for path in tmp_path.glob("*.md")]
    assert text in shown and [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [
        f"| {label}" for label in ("constant", "copy", "warp", *(row.label for row in TABLES["topology"].rows))
    ]
    facts = json.loads((tmp_path / "topology.json").read_text())
    first, *_, last = facts["rows"]
    assert (
        first["label"] == "constant" and first["explained"] == {"one of six missing": [0.0] * 3} and not first["speed"]
    )
    assert len(last["speed"]) == 1 and facts["machine"]["torch"] == torch.__version__
    runs = {path.name: (path / "result.json").stat().st_mtime for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == 3
    completion_tables.main([*arguments, "--cfg-options", *quick])
    assert runs == {path.name: (path / "result.json").stat().st_mtime for path in (tmp_path / "runs").iterdir()}
    with pytest.raises(SystemExit):
        completion_tables.main([*arguments, "--cfg-options", *quick, "optim.lr=1"])
    assert "was trained with other settings (optim.lr: 0.005 → 1.0)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        completion_tables.main([*arguments[:-2], "--windows", "0"])
