"""What the record says of completion: verdicts and spreads."""

from pathlib import Path

import torch

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train.record import by_config, markdown
from rigfuse.train.run import SavedRun
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion import record
from rigfuse.train.systems.completion.evaluate import BASELINES, Score
from rigfuse.train.systems.completion.record import CompletionRun


def run_of(name: str, seed: int, error: float, speed: float, memory: float) -> CompletionRun:
    settings = experiment(name)
    settings.run.seed = seed
    line = {"step": 10, "speed/it_per_s": speed, "memory/peak_mib": memory, "loss": 1.0, "val/relative_l2": 0.5}
    scores = [
        Score(camera, method, stride, error, 1 - error, 0.9, error, 1 - error, 0.9)
        for camera in NUSCENES_CAMERAS
        for method in (*BASELINES, "completed")
        for stride in (8, 16)
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


def test_verdicts_on_v3():
    def rows(explained, seeds=3, worst=None):
        v2 = [run_of("completion_v2_tiny", seed, 0.7, 1.0, 1.0) for seed in range(3)]
        v3 = [run_of("completion_v3_tiny", seed, 1 - explained, 1.0, 1.0) for seed in range(seeds)]
        for run in v3 if worst is not None else []:
            run.scores.append(Score("CAM_FRONT, lost from the start", "completed", 8, 1.0, worst, 0, 1, worst, 0))
        return [row[1:] for row in record.verdicts(by_config([*v2, *v3]))[1:]]

    assert rows(0.45)[0] == ["+0.450 ± 0.000 against +0.300 ± 0.000, × 1.50", "holds"]
    assert rows(0.35)[0][1] == "does not hold" and rows(0.45, seeds=2)[0][1] == "cannot tell"
    assert rows(0.45)[1][1] == "holds" and rows(-0.1)[1][1] == "does not hold"
    assert rows(0.45)[2] == ["—", "cannot tell"]
    assert rows(0.45, worst=-0.2)[2] == [
        "worst: CAM_FRONT, lost from the start, stride 8, explains -0.200",
        "does not hold",
    ]
    table = record.explained_table(by_config([run_of("completion_v3_tiny", 0, 0.6, 1.0, 1.0)]))
    assert table[0][1] == "FRONT" and table[-1] == ["completion_v3_tiny", *["+0.400"] * 7]


def test_tables_give_spreads_over_seeds():
    runs = [run_of("completion_v1_tiny", seed, 0.4 + 0.1 * seed, 2.0, 1000.0) for seed in range(3)]
    table = record.scores_table(by_config(runs), "relative_l2", 8)
    assert table[0] == ["scenario", "none", "zeros", "constant", "copy", "warp", "completion_v1_tiny"]
    assert table[1] == ["CAM_FRONT", *["0.500 ± 0.100"] * 6]
    assert len(markdown(table).splitlines()) == 2 + 6
    assert record.scores_table(by_config(runs), "explained", 32)[1] == ["CAM_FRONT", *["—"] * 6]  # no such scale


def test_the_constant_is_measured_once_and_kept_with_the_run(tmp_path):
    run, measured = run_of("completion_v1_tiny", 0, 0.5, 2.0, 1000.0), []

    def measure(model):
        measured.append(model)
        return [torch.full((6, 2, 3, 4), float(len(measured)))]

    run.settings.constant = measure
    model = torch.nn.Linear(1, 1)

    def kept(step=10):
        saved = SavedRun(tmp_path / "checkpoints" / "best.pt", dict(counters=dict(step=step)), run.settings)
        return record.constant_of(CompletionRun(tmp_path, saved, [], []), model)[0].unique().tolist()

    assert kept() == kept() == [1.0] and (tmp_path / "constant.pt").is_file()
    assert kept(step=20) == [2.0]  # another checkpoint has other features
    run.settings.data.root = "elsewhere"
    assert kept(step=20) == kept(step=20) == [3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["constant.pt"]
