"""The record of driving runs: a block for each task, and verdicts with seeds."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rigfuse.train.claims import FAILS, HOLDS, UNSURE
from rigfuse.train.systems import experiment
from rigfuse.train.systems.sparse_drive.record import BLOCKS, within


def run(version, seed, speed, **figures):
    """A run as `train.record` has it."""
    settings = experiment(f"sparsedrive_small_stage2_{version}")
    settings.run.seed = seed
    return SimpleNamespace(folder=Path(f"{version}-{seed}"), settings=settings, speed=speed, memory=100.0, best=figures)


def test_every_block_and_the_verdicts():
    numbers = {name: 0.5 for figures in BLOCKS.values() for name in figures}
    numbers["plan/constant velocity/L2/mean"] = 2.0
    runs = [
        run(version, seed, speed, **numbers | {"masked/mAP": masked + seed / 1e5})
        for version, speed, masked in (("v1", 1.0, 0.30), ("v2", 1.5, 0.40))
        for seed in range(3)
    ]
    text = "\n".join(runs[0].settings.record_sections(runs, Path("."), None))
    assert all(f"## {block}\n" in text for block in BLOCKS) and "Not measured" not in text
    v1, v2 = "sparsedrive_small_stage2_v1", "sparsedrive_small_stage2_v2"
    assert f"| figure | {v1} | {v2} |" in text
    assert "| plan/constant velocity/L2/mean | 2.0000 ± 0.0000 | 2.0000 ± 0.0000 |" in text
    assert f"| {v2}: speed +20 to +40 %, a whole run | × 1.50 | {HOLDS} |" in text
    assert f"| {v2}: mAP within 1 % of V1's | 0.5000 ± 0.0000 against 0.5000 ± 0.0000 | {HOLDS} |" in text
    assert f"{v2}: masked/mAP within 1 % of V1's" in text
    nothing = "\n".join(runs[0].settings.record_sections([run("v1", 0, 1.0)], Path("."), None))
    assert nothing.count("Not measured.") == len(BLOCKS) and "verdicts" not in nothing


@pytest.mark.parametrize(
    "before, now, larger, verdict",
    [
        ([0.50, 0.50, 0.50], [0.496, 0.496, 0.496], True, HOLDS),
        ([0.50, 0.50, 0.50], [0.49, 0.49, 0.49], True, FAILS),
        ([0.50, 0.50, 0.50], [0.49, 0.49, 0.49], False, HOLDS),
        ([0.50, 0.50, 0.50], [0.51, 0.51, 0.51], False, FAILS),
        ([0.48, 0.50, 0.52], [0.49, 0.50, 0.51], True, UNSURE),  # noise
        ([0.50, 0.50], [0.50, 0.50], True, UNSURE),  # too few seeds
    ],
)
def test_no_verdict_without_seeds_or_within_the_noise(before, now, larger, verdict):
    assert within(before, now, larger) == verdict
