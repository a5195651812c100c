"""The table of camera losses: its scenarios, and the share recovered by cases whose answer is known."""

import pytest
import torch

from rigfuse.modules.rig import NUSCENES_CAMERAS
from rigfuse.train.systems.sparse_drive.camera_loss import (
    ANY,
    BLACK,
    HIDDEN,
    NOTHING,
    Cell,
    measure,
    recovered,
    report,
    scenarios,
    table,
)
from rigfuse.train.tools import camera_loss_table


def cells(no_loss, black, v2, figure="mAP"):
    rows = [(BLACK, NOTHING, no_loss), (BLACK, "CAM_BACK", black), ("v2", NOTHING, no_loss), ("v2", "CAM_BACK", v2)]
    return [Cell(method, 0, name, {figure: value}) for method, name, value in rows]


def test_every_camera_and_every_pair_of_neighbours():
    which = scenarios(NUSCENES_CAMERAS, lasting=3)
    assert len(which) == 1 + 6 + 6 and which[NOTHING].cameras == ()
    assert all(fault.cameras == tuple(name.split(" + ")) for name, fault in which.items() if name != NOTHING)
    assert {fault.lasting for name, fault in which.items() if name != NOTHING} == {3}
    assert "CAM_FRONT + CAM_BACK" not in which and "CAM_FRONT + CAM_FRONT_LEFT" in which
    assert list(scenarios(NUSCENES_CAMERAS, pairs=False)) == [NOTHING, *NUSCENES_CAMERAS]


@pytest.mark.parametrize(
    "figure, values, share",
    [
        ("mAP", (0.4, 0.2, 0.3), 0.5),
        ("mAP", (0.4, 0.2, 0.1), -0.5),
        ("plan/L2/mean", (1.0, 2.0, 1.25), 0.75),
        ("mAP", (0.4, 0.4, 0.5), None),  # the loss costs nothing
        ("plan/L2/mean", (2.0, 1.0, 1.0), None),  # … or less than nothing
        ("mAP", (0.4, 0.39, 0.4), None),  # … or hardly anything
    ],
)
def test_the_share_recovered(figure, values, share):
    found = cells(*values, figure)
    assert recovered(found, "v2", "CAM_BACK", figure) == (None if share is None else pytest.approx(share))
    assert table(found, figure)[2][-1] == ("n/a" if share is None else f"{share:.0%}")


def test_means_are_over_seeds():
    found = cells(0.4, 0.2, 0.3) + [Cell("v2", 1, "CAM_BACK", {"mAP": 0.4})]
    assert recovered(found, "v2", "CAM_BACK", "mAP") == pytest.approx(0.75)
    assert recovered(found, "v2", "CAM_FRONT", "mAP") is None
    other = [Cell(method, 0, "CAM_FRONT", {"mAP": 0.0}) for method in (BLACK, "v2")]
    assert recovered(found + other, "v2", ANY, "mAP") == pytest.approx((0.275 - 0.1) / (0.4 - 0.1))  # seeds .15, .4
    text = report(found, 0)
    assert "## mAP, larger is better" in text and "plan/L2" not in text and "Seeds: 0, 1 (too few" in text


def test_the_command_asks_for_runs_of_this_system(tmp_path, capsys):
    with pytest.raises(SystemExit):
        camera_loss_table.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "camera_loss_table: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_is_measured(small_world, tmp_path):
    """A fresh network without completion, by both methods; the picture is drawn."""
    from rigfuse.train.config import apply_options
    from rigfuse.train.systems import experiment

    class Fresh:
        settings = apply_options(
            experiment("sparsedrive_small_stage1_tiny"),
            ["data.image_size=36,64", f"data.root={small_world}", f"data.cache={tmp_path / 'cache'}",
             "evaluation.tasks=detection,map", "model.head.detection.anchors=12", "model.head.detection.kept=4"],
        )  # fmt: skip
        path = tmp_path

        def build_model(self, device):
            return self.settings.build_model().to(device)

    which = dict(list(scenarios(NUSCENES_CAMERAS, pairs=False).items())[:2])
    found = measure([Fresh()], which, torch.device("cpu"))
    assert [(cell.method, cell.scenario) for cell in found] == [
        (method, name) for method in (BLACK, HIDDEN) for name in which
    ]
    assert all({"mAP", "NDS", "map/mAP"} == cell.figures.keys() for cell in found)
    camera_loss_table.draw(found, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
