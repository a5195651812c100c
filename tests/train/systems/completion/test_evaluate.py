"""The evaluation of completion and the record that is written from it."""

from pathlib import Path

import pytest
import torch

from rigfuse.modules.completion.cascade import RigWindow
from rigfuse.modules.rig import NUSCENES_CAMERAS, ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.train import record
from rigfuse.train.data import open_drives
from rigfuse.train.record import Run
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion.evaluate import Scenario, Score, evaluate_completion, scenarios
from rigfuse.train.tools import write_record

HEIGHT, WIDTH = 112, 200


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return experiment("completion_v2_tiny").build_model()


def window(standing: bool) -> RigWindow:
    """Three moments; standing: the vehicle does not move and every camera sees the same each time."""
    rig = nuscenes_like_rig().augmented(ImageAugmentation(resize=WIDTH / 1600, crop=(0, 0, WIDTH, HEIGHT)))
    drive = open_drives(None)[0]
    frames = []
    for step in range(3):
        moment = drive[0 if standing else step].frame
        frames.append(RigFrame(rig.image_T_ego[None], moment.world_T_ego, moment.timestamp + 0.5 * step, moment.scene))
    images = torch.randn(1, 1 if standing else 3, 6, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    ahead = torch.stack([torch.arange(1, 7) * 4.0, torch.zeros(6)], dim=-1)[None]
    return RigWindow(images.expand(-1, 3, -1, -1, -1, -1), frames, ahead)


def test_scenarios_cover_cameras_pairs_and_lost_moments():
    found = scenarios(NUSCENES_CAMERAS, history=3)
    assert [s.cameras for s in found[:6]] == [(name,) for name in NUSCENES_CAMERAS]
    pairs = [set(s.cameras) for s in found if len(s.cameras) == 2]
    assert len(pairs) == 6 and {"CAM_FRONT", "CAM_BACK"} not in pairs
    assert [s.lost for s in found if s.lost] == [1, 2, 3, 1, 2, 3]


def test_a_standing_vehicle_is_completed_perfectly_from_its_past(model):
    which = [Scenario("now", ("CAM_FRONT",)), Scenario("long gone", ("CAM_FRONT",), lost=2)]
    scores = {(s.scenario, s.method, s.stride): s for s in evaluate_completion(model, [window(True)], which)}
    for stride in model.backbone.strides:
        for method in ("copy", "warp"):
            assert scores["now", method, stride].relative_l2 < 1e-3
            assert scores["now", method, stride].corridor_cosine > 0.999
            nothing = scores["long gone", "none", stride]
            assert scores["long gone", method, stride].relative_l2 == nothing.relative_l2 > 0.5
    # An untrained stage 1 begins at the warp of the camera's own past; the gate lets a trace of black through.
    assert scores["now", "completed", model.temporal.stride].relative_l2 < 0.1


def test_the_past_is_worth_less_when_the_vehicle_moves(model):
    scores = {s.method: s for s in evaluate_completion(model, [window(False)], [Scenario("now", ("CAM_BACK",))])}
    assert 0.3 < scores["copy"].relative_l2 and scores["copy"].cosine < 0.99
    assert scores["copy"].corridor_relative_l2 != scores["copy"].corridor_relative_l2  # NaN: no path behind the car


def run_of(name: str, seed: int, error: float, speed: float, memory: float) -> Run:
    settings = experiment(name)
    settings.run.seed = seed
    line = {"step": 10, "speed/it_per_s": speed, "memory/peak_mib": memory, "loss": 1.0, "val/relative_l2": 0.5}
    scores = [
        Score(camera, method, 16, error, 0.9, error, 0.9)
        for camera in NUSCENES_CAMERAS
        for method in ("none", "copy", "warp", "completed")
    ]
    return Run(Path(f"{name}_{seed}"), settings, [line], scores)


def verdicts(v2_error=0.501, v2_speed=3.0, v2_memory=400.0):
    v1 = [run_of("completion_v1_tiny", seed, 0.5 + 0.001 * seed, 2.0, 1000.0) for seed in range(3)]
    v2 = [run_of("completion_v2_tiny", seed, v2_error, v2_speed, v2_memory) for seed in range(3)]
    return [row[-1] for row in record.verdicts(record.by_config([*v1, *v2]))[1:]]


def test_verdicts_follow_from_the_figures():
    assert verdicts() == ["holds"] * 3
    assert verdicts(v2_speed=2.3) == ["does not hold", "holds", "holds"]
    assert verdicts(v2_memory=750.0) == ["holds", "does not hold", "holds"]
    assert verdicts(v2_error=0.51) == ["holds", "holds", "does not hold"]


def test_tables_give_spreads_over_seeds():
    runs = [run_of("completion_v1_tiny", seed, 0.4 + 0.1 * seed, 2.0, 1000.0) for seed in range(3)]
    table = record.scores_table(record.by_config(runs), "relative_l2")
    assert table[0] == ["scenario", "none", "copy", "warp", "completion_v1_tiny"]
    assert table[1] == ["CAM_FRONT", *["0.500 ± 0.100"] * 4]
    assert len(record.markdown(table).splitlines()) == 2 + 6


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
