"""The evaluation of completion."""

import pytest
import torch

from rigfuse.modules.rig import NUSCENES_CAMERAS, ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.window import RigWindow
from rigfuse.train.data import open_drives
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion.evaluate import Scenario, evaluate_completion, scenarios

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
