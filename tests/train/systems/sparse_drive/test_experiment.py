"""The driving model as an experiment: it streams as it trains, its figures are those of known results, it resumes."""

import json
import math

import pytest
import torch

from rigfuse.modules.sparse_drive.network import SparseDrive
from rigfuse.train import checkpoint
from rigfuse.train import main as program
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.anchors import find_anchors
from rigfuse.train.systems.sparse_drive.baselines import Memory, results_of_truth
from rigfuse.train.systems.sparse_drive.evaluate import DrivingFigures, Seen, drive

STAGE2 = "sparsedrive_small_stage2_tiny"
SMALL = (
    "data.image_size=36,64", "data.box_distance=55",
    "model.head.channels=32", "model.head.heads=2", "model.head.detection.anchors=20",
    "model.head.detection.kept=8", "model.head.detection.layers=2", "model.head.detection.deformable.groups=4",
    "model.head.lines.anchors=8", "model.head.lines.kept=3", "model.head.lines.layers=2",
    "model.head.lines.deformable.groups=4", "model.head.lines.points=6", "model.head.motion.agents=8",
)  # fmt: skip


@pytest.fixture
def settings(small_world, tmp_path):
    made = apply_options(experiment(STAGE2), SMALL)
    made.data.root, made.data.cache = str(small_world), str(tmp_path / "cache")
    check(made)
    return made


@pytest.mark.parametrize(
    "option, message",
    [
        ("model.head.detection.kept=20", "model.head.detection.kept is 20, needs less than 20 anchors"),
        ("model.head.lines.deformable.groups=5", "model.head.lines.deformable.groups is 5, needs a divisor of 32"),
        ("model.head.motion.ego_view=FRONT", "model.head.motion.ego_view is 'FRONT', needs 'all' or a camera"),
        ("evaluation.tasks=map", "evaluation.tasks are map, needs detection, and of tracking"),
        ("metric=map/mAp", "metric is 'map/mAp'; did you mean 'map/mAP'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, option, message):
    apply_options(settings, [option])
    with pytest.raises(ValueError) as error:
        check(settings)
    assert str(error.value).startswith(message)


def test_a_model_needs_the_cameras_of_the_data(settings):
    settings.model.head.cameras = settings.model.head.cameras[::-1]
    with pytest.raises(ValueError, match="has the cameras CAM_FRONT, .*; model.head.cameras are CAM_BACK, "):
        settings.build_data()


def batches(settings, samples, indices):
    return [settings.collate([samples[0, index]]).to("cpu") for index in indices]


@torch.no_grad()
def test_streaming_is_what_windows_train(settings):
    """Moment by moment through `drive`, and the present of a window after its past: the same boxes and plan."""
    _, validation = settings.build_data()
    model = settings.build_model().eval()
    (last,) = list(drive(model, batches(settings, validation, [0, 1]), settings.results))[1:]
    moments = batches(settings, validation, [0, 1])
    state = None
    for batch in moments:
        output, state, _ = SparseDrive.forward(model, batch.images[:, 0], batch.frames[0], state)
    scores, _ = output.detection.logits[-1][0].sigmoid().max(-1)
    torch.testing.assert_close(last.result.class_scores.sort().values, scores.sort().values)
    fresh = list(drive(model, moments[1:], settings.results))[0].result
    assert not torch.equal(fresh.class_scores.sort().values, scores.sort().values)  # the past has a say


def test_who_knows_the_truth_is_perfect(settings):
    """In every task; so frames, classes and steps of results are those of the truth."""
    settings.evaluation.tasks = ("detection", "map", "motion", "planning")
    _, validation = settings.build_data()
    figures = DrivingFigures(settings, settings.model.head)
    for batch in batches(settings, validation, range(3)):
        batch.truth.ego_future_known[:] = True  # the scene is too short for a whole plan
        figures.add(Seen(batch, 0, results_of_truth(batch.truth, 0), measured=None))
    found = figures.compute()
    present = {name for name in found if name.startswith("AP/") and found[name] > 0}
    assert len(present) >= 5 and all(found[name] > 0.95 for name in present) and found["mATE"] < 1
    assert found["map/mAP"] == 1 and found["motion/minADE/car"] < 1e-3
    assert found["motion/matches/car"] == found["motion/truths/car"] > 5
    assert found["plan/L2/mean"] < 1e-4 < 0.1 < found["plan/constant velocity/L2/mean"]
    assert "plan/measured status/L2/mean" not in found


def test_a_memory_finds_the_moment_again(settings):
    """Of its own moments it knows everything; of others it says what is nearest."""
    settings.evaluation.tasks = ("detection", "map", "motion", "planning")
    training, validation = settings.build_data()
    memory = Memory(validation)
    for seen in memory.drive(batches(settings, validation, range(3))):
        torch.testing.assert_close(seen.result.boxes[:, :9], seen.batch.truth.boxes[0].nan_to_num())
    (other,) = Memory(training).drive(batches(settings, validation, [1]))
    assert other.result.boxes.shape != other.batch.truth.boxes[0].shape or not torch.equal(
        other.result.boxes[:, :9], other.batch.truth.boxes[0]
    )


def test_train_resume_and_evaluate_from_the_command_line(small_world, tmp_path, capsys):
    options = [*SMALL, f"data.cache={tmp_path / 'cache'}", "loader.batch_size=1", "run.log_steps=1"]
    options += ["run.epochs=2", "run.evaluate_epochs=2", "run.checkpoint_steps=1", "run.keep=50"]
    options += ["run.tensorboard=false"]
    common = ["--config", STAGE2, "--data", str(small_world)]
    program.main([*common, "--work-dir", str(tmp_path / "whole"), "--cfg-options", *options])
    steps = checkpoint.checkpoints(tmp_path / "whole" / "checkpoints")[::-1]
    records = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    trained, evaluated = [line for line in records if "loss" in line], records[-1]
    assert len(trained) == len(steps) == 4 and all(line["skipped"] == 0 for line in trained)
    assert {f"losses/{name}" for name in experiment(STAGE2).losses} <= trained[0].keys()
    expected = {"NDS", "tracking/AMOTA", "map/mAP", "motion/truths/car", "plan/skipped"}
    assert {f"val/{name}" for name in expected} <= evaluated.keys()

    resume = ["--work-dir", str(tmp_path / "part"), "--resume", str(steps[1])]
    program.main([*common, *resume, "--cfg-options", *options])
    whole, part = (checkpoint.load(tmp_path / run / "checkpoints" / "last.pt") for run in ("whole", "part"))
    assert all(torch.equal(part["model"][name], value) for name, value in whole["model"].items())
    capsys.readouterr()
    program.main(["--eval-only", str(steps[-1])])
    figures = json.loads(capsys.readouterr().out)
    assert {f"val/{name}": value for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in evaluated.items() if name.startswith("val/")}, abs=1e-6
    )


def test_a_world_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="data.root is empty, driving needs a folder in nuScenes format"):
        program.main(["--config", STAGE2, "--work-dir", str(tmp_path / "run")])


def test_two_frames_are_learned_by_heart(settings):
    """Boxes up to 30 m are found again, of the right class and within 2 m, and none of them by a fresh network."""
    settings = apply_options(experiment("sparsedrive_small_stage1_tiny"), OVERFIT + tuple(
        f"data.{name}={getattr(settings.data, name)}" for name in ("root", "cache")
    ))  # fmt: skip
    training, _ = settings.build_data()
    model = settings.build_model()
    model.head.set_anchors(find_anchors(training))
    batch = settings.collate([training[0, index] for index in (0, 2)]).to("cpu")
    assert recall(settings, model, batch) < 0.2
    optimizer, steps = torch.optim.AdamW(model.parameters(), weight_decay=0), 55
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        losses = model(batch).losses
        optimizer.zero_grad()
        sum(settings.losses[name] * value for name, value in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 25.0)
        optimizer.step()
    assert recall(settings, model, batch) > 0.9


OVERFIT = (
    "data.image_size=64,112", "data.history=0", "data.box_distance=30", "data.depth=false",
    "model.head.detection.anchors=40", "model.head.detection.kept=10", "model.head.detection.dropout=0",
    "model.head.detection.deformable.keypoint_dropout=0", "model.head.lines.anchors=16", "model.head.lines.kept=4",
    "model.head.lines.points=6",
)  # fmt: skip


def recall(settings, model, batch):
    batch.order, found = [0] * len(batch.tokens), []
    for seen in drive(model, [batch], settings.results):
        result = seen.result
        for box, label in zip(batch.truth.boxes[seen.index], batch.truth.labels[seen.index]):
            near = (result.boxes[:, :2] - box[:2]).norm(dim=1) < 2
            found.append(bool((near & (result.labels == label) & (result.class_scores > 0.2)).any()))
    model.train()
    return sum(found) / len(found)
