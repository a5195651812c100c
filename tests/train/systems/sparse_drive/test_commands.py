"""The commands beside training: anchors of a root, and a run beside its rivals."""

from pathlib import Path

import pytest

from rigfuse.train.run import SavedRun
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.anchors import read_anchors
from rigfuse.train.tools import compare_driving, draw_driving, make_anchors


def test_anchors_by_a_command(small_world, tmp_path, capsys):
    out = tmp_path / "new" / "anchors.json"
    options = [f"data.cache={tmp_path / 'cache'}", "model.head.detection.anchors=12", "model.head.detection.kept=4"]
    arguments = ["--config", "sparsedrive_small_stage2_tiny", "--data", str(small_world), "--out", str(out)]
    assert make_anchors.main([*arguments, "--cfg-options", *options]) == 0
    first = out.read_text()
    assert make_anchors.main([*arguments, "--cfg-options", *options]) == 0 and out.read_text() == first
    assert read_anchors(out).boxes.shape == (12, 11) and "12 boxes, 24 lines" in capsys.readouterr().out
    arguments[1] = "completion_v2_tiny"
    assert make_anchors.main(arguments) == 1
    assert "completion_v2_tiny has no anchors" in capsys.readouterr().err


def test_a_report_has_a_column_for_each_rival():
    model = {"mAP": 0.5, "AP/car": 0.25, "map/mAP": 0.125, "plan/L2/mean": 1.0, "plan/constant velocity/L2/mean": 2.0}
    text = compare_driving.report(dict(model=model, memory={"mAP": 0.0}), Path("run"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["figure", "model", "memory"] and ["mAP", "0.5000", "0.0000"] in rows
    assert ["AP/car", "0.2500", "n/a"] in rows and ["plan/constant velocity/L2/mean", "2.0000", ""] in rows


@pytest.mark.parametrize("command", [compare_driving, draw_driving])
def test_runs_of_other_systems_are_refused(command, tmp_path, monkeypatch, capsys):
    other = SavedRun(tmp_path, {}, experiment("completion_v2_tiny"))
    monkeypatch.setattr(command, "open_run", lambda *arguments: other)
    try:
        assert command.main(["run", "--out", str(tmp_path / "out")]) == 1
    except SystemExit as end:
        assert end.code == 1
    assert "needs a run of sparse_drive" in capsys.readouterr().err and not (tmp_path / "out").exists()
