"""From two short trainings to the record of the experiment, by the commands that people use."""

import json
import math

import pytest
import torch
from PIL import Image

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train import checkpoint
from rigfuse.train import main as program
from rigfuse.train.config import to_dict, update
from rigfuse.train.systems import experiment
from rigfuse.train.tools import write_record

DETECTOR = "cmt_aqr_voxel0100_r50_800x320_cbgs_tiny"
RUNS = ("completion_v1_tiny", "completion_v2_tiny")
WINDOWS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of a few steps, and the record of them."""
    folder = tmp_path_factory.mktemp("experiment")
    short = ("data.scenes=1,1", "data.image_size=48,80", "run.epochs=1", "run.log_steps=2", "run.tensorboard=false")
    for name in RUNS:
        options = (*short, "loader.batch_size=8", "run.evaluate_epochs=1")
        program.main(["--config", name, "--work-dir", str(folder / name), "--cfg-options", *options])
    arguments = [*(str(folder / name) for name in RUNS), "--out", str(folder / "record"), "--windows", f"{WINDOWS}"]
    assert write_record.main(arguments) == 0
    return folder


def tables(folder):
    """Heading → rows of cells, of record.md."""
    found, heading = {}, ""
    for line in (folder / "record" / "record.md").read_text().splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if line.startswith("| ") and not line.startswith("| ---"):
            found.setdefault(heading, []).append(line.strip("| ").split(" | "))
    return found


def error_of(folder, camera):
    """‖completed − true‖ / ‖true‖ at the scale of stage 1, by running the cascade of the best checkpoint as it is."""
    state = checkpoint.load(folder / "checkpoints" / "best.pt")
    settings = update(experiment(folder.name), state["config"])
    model = settings.build_model().eval()
    model.load_state_dict(state["model"])
    validation = settings.build_data()[1]
    place, error, true = model.temporal_scale, 0.0, 0.0
    for index in range(0, WINDOWS * (len(validation) // WINDOWS), len(validation) // WINDOWS):
        with torch.no_grad():
            output = model(settings.collate([validation[0, index]]).to("cpu"), drop=[camera])
        completed, target = (x[place][output.missing].double() for x in (output.features, output.teacher))
        error, true = error + (completed - target).square().sum(), true + target.square().sum()
    return float((error / true).sqrt())


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_those_of_the_checkpoints(folder, name):
    scores = json.loads((folder / "record" / "scores.json").read_text())[str(folder / name)]
    completed = {s["scenario"]: s["relative_l2"] for s in scores if s["method"] == "completed" and s["stride"] == 16}
    cells = {
        row[0]: row
        for row in tables(folder)[
            "Relative L2 error of the absent cameras' features (0 = as if they were there), stride 16"
        ]
    }
    column = cells["scenario"].index(name)
    for camera in ("CAM_FRONT", "CAM_BACK_RIGHT"):
        assert completed[camera] == pytest.approx(error_of(folder / name, camera), rel=1e-5)
        assert cells[camera][column] == f"{completed[camera]:.3f}"
    assert completed["CAM_FRONT"] != completed["CAM_BACK_RIGHT"]


def test_the_runs_are_told_as_they_were_logged(folder):
    head, *rows = tables(folder)["Runs"]
    assert [row[0] for row in rows] == list(RUNS)
    for row in rows:
        lines = [json.loads(line) for line in (folder / row[0] / "log.jsonl").read_text().splitlines()]
        cells, trained = dict(zip(head, row)), [line for line in lines if "loss" in line]
        assert cells["steps"] == f"{trained[-1]['step']}" and cells["last loss"] == f"{trained[-1]['loss']:.4f}"
        assert cells["peak MiB"].replace(",", "") == f"{max(line['memory/peak_mib'] for line in trained):.0f}"
        assert cells["best validation"] == f"relative_l2 {lines[-1]['val/relative_l2']:.4f}"


def test_every_scenario_and_every_claim_has_its_line(folder):
    found = tables(folder)
    assert len(found) == 4 + 4 * 2  # four figures at two scales
    explained = found["Variance explained about the constant by camera, mean over the scales"]
    assert [row[0] for row in explained[1:]][-len(RUNS) :] == list(RUNS)
    for heading in list(found)[4:]:
        scenarios = [row[0] for row in found[heading][1:]]
        assert scenarios[:6] == list(NUSCENES_CAMERAS) and len(scenarios) == 6 + 6 + 3 * 6
        assert found[heading][0][1:] == ["none", "zeros", "constant", "copy", "warp", *RUNS]
    claims = found["Completion of missing cameras: verdicts"][1:]
    assert len(claims) == 3 and {row[-1] for row in claims} <= {"holds", "does not hold"}
    assert all("completion_v2_tiny" in row[0] for row in claims)


def test_the_pictures_show_something_and_nothing_half_written_is_left(folder):
    assert {path.name for path in folder.iterdir()} == {*RUNS, "record"}
    pictures = {"losses.png", "errors.png", "features.png"}
    assert {path.name for path in (folder / "record").iterdir()} == pictures | {"record.md", "scores.json"}
    text = (folder / "record" / "record.md").read_text()
    for name in pictures:
        with Image.open(folder / "record" / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
        assert f"({name})" in text


def saved_run(folder, name, *evaluations):
    """A run of a system whose record has no sections of its own, from its log alone."""
    settings = experiment(name)
    state = dict(model={}, config=to_dict(settings), counters=dict(step=2))
    checkpoint.save(folder / "checkpoints", 2, state, keep=1)
    line = {"loss": 1.5, "speed/it_per_s": 2.0, "memory/peak_mib": 100.0}
    lines = [dict(step=step, **line, **found) for step, found in enumerate(evaluations, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_detectors_record_takes_the_largest_metric(tmp_path):
    better = {"val/NDS": 0.6, "val/mAP": 0.4}
    run = saved_run(tmp_path / "run", DETECTOR, {"val/NDS": 0.5, "val/mAP": 0.7}, better, {"val/NDS": math.nan})
    assert write_record.main([str(run), "--out", str(tmp_path / "record")]) == 0
    found = tables(tmp_path)
    head, row = found["Runs"]
    assert dict(zip(head, row))["best validation"] == "NDS 0.6000"
    assert found["Validation figures of the best checkpoints"][1:] == [["NDS", "0.6000"], ["mAP", "0.4000"]]
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"record.md", "losses.png"}


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert write_record.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "is not the folder of a run" in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    for arguments, expected in [
        (["a", "--out", str(tmp_path)], "exists already"),
        (["a", "--oot", "b"], "--out"),
        (["a", "--out", "b", "--windows", "0"], "needs at least 1"),
    ]:
        with pytest.raises(SystemExit) as stop:
            write_record.main(arguments)
        assert stop.value.code == 2 and expected in capsys.readouterr().err
