"""What the record says of completion: verdicts and spreads."""

from pathlib import Path

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train.record import by_config, markdown
from rigfuse.train.run import SavedRun
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion import record
from rigfuse.train.systems.completion.evaluate import Score
from rigfuse.train.systems.completion.record import CompletionRun


def run_of(name: str, seed: int, error: float, speed: float, memory: float) -> CompletionRun:
    settings = experiment(name)
    settings.run.seed = seed
    line = {"step": 10, "speed/it_per_s": speed, "memory/peak_mib": memory, "loss": 1.0, "val/relative_l2": 0.5}
    scores = [
        Score(camera, method, 16, error, 0.9, error, 0.9)
        for camera in NUSCENES_CAMERAS
        for method in ("none", "copy", "warp", "completed")
    ]
    folder = Path(f"{name}_{seed}")
    return CompletionRun(folder, SavedRun(folder / "checkpoints" / "best.pt", {}, settings), [line], scores)


def verdicts(v2_error=0.501, v2_speed=3.0, v2_memory=400.0):
    v1 = [run_of("completion_v1_tiny", seed, 0.5 + 0.001 * seed, 2.0, 1000.0) for seed in range(3)]
    v2 = [run_of("completion_v2_tiny", seed, v2_error, v2_speed, v2_memory) for seed in range(3)]
    return [row[-1] for row in record.verdicts(by_config([*v1, *v2]))[1:]]


def test_verdicts_follow_from_the_figures():
    assert verdicts() == ["holds"] * 3
    assert verdicts(v2_speed=2.3) == ["does not hold", "holds", "holds"]
    assert verdicts(v2_memory=750.0) == ["holds", "does not hold", "holds"]
    assert verdicts(v2_error=0.51) == ["holds", "holds", "does not hold"]


def test_tables_give_spreads_over_seeds():
    runs = [run_of("completion_v1_tiny", seed, 0.4 + 0.1 * seed, 2.0, 1000.0) for seed in range(3)]
    table = record.scores_table(by_config(runs), "relative_l2")
    assert table[0] == ["scenario", "none", "copy", "warp", "completion_v1_tiny"]
    assert table[1] == ["CAM_FRONT", *["0.500 ± 0.100"] * 4]
    assert len(markdown(table).splitlines()) == 2 + 6
