"""The evaluation of completion."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from rigfuse.modules.camera_dropout import RandCamMask
from rigfuse.modules.completion.cascade import CompletionCascade
from rigfuse.modules.history import HistoryQueue
from rigfuse.modules.rig import NUSCENES_CAMERAS, ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.window import RigWindow
from rigfuse.train.data import open_drives
from rigfuse.train.data.windows import Windows
from rigfuse.train.systems import experiment
from rigfuse.train.systems.completion.baselines import training_mean, warp_rig
from rigfuse.train.systems.completion.evaluate import Scenario, evaluate_completion, look, scenarios
from support.wall import DISTANCE, STRIDE, Pooling, image_of, wall_frame

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
    found = scenarios(NUSCENES_CAMERAS, history=4)
    assert [s.cameras for s in found[:6]] == [(name,) for name in NUSCENES_CAMERAS]
    pairs = [set(s.cameras) for s in found if len(s.cameras) == 2]
    assert len(pairs) == 6 and {"CAM_FRONT", "CAM_BACK"} not in pairs
    assert [s.lost for s in found if s.lost] == [1] * 6 + [3] * 6 + [4] * 6  # ten moments are all that a window has
    assert [s.cameras for s in found if not s.history] == [(name,) for name in NUSCENES_CAMERAS]
    assert len({s.name for s in found}) == len(found) == 6 + 6 + 3 * 6 + 6


# ---- by formula: six cameras along a wall


SIZE = (3, 12)  # cells
LEFT = ("CAM_FRONT_LEFT",)


def along_the_wall(*moments, history_of=None):
    """A cascade without stages, and a window of moments (cells driven, shift of the image); each shows what the wall
    has there, a colour for each column, or `history_of(step)` (3, H, W)."""
    wall = torch.rand(3, 1, 60, generator=torch.Generator().manual_seed(2)) + 0.5
    frames, features = [], []
    for step, (cells, shift) in enumerate(moments):
        first = 10 + cells - shift
        shown = wall[..., first : first + SIZE[1]].expand(-1, *SIZE) if history_of is None else history_of(step)
        frames.append(wall_frame(cells, SIZE, time=0.5 * step, shift=shift))
        features.append(shown.expand(1, 6, -1, -1, -1))
    images = image_of(torch.stack(features, dim=1))
    return CompletionCascade(Pooling(), RandCamMask()), RigWindow(images, frames, torch.zeros(1, 6, 2))


def figures_of(model, window, *which, **settings):
    scores = evaluate_completion(model, [window], which, depths=(DISTANCE,), **settings)
    return {(s.scenario, s.method): s for s in scores}


@pytest.mark.parametrize("cells, shift", [(1, 0), (3, 0), (-2, 0), (0, 2), (1, -3)])
def test_the_warp_brings_the_wall_to_where_it_is_now(cells, shift):
    """A wall at the listed depth, motion and another cut of the image in whole cells: what both see fits exactly."""
    model, window = along_the_wall((0, shift), (cells, 0))
    then, now = (look(model, window).moments[step][0] for step in (0, 1))
    moved = warp_rig(then, *window.frames, STRIDE, (DISTANCE,))
    first, last = max(0, -cells - shift), SIZE[1] - max(0, cells + shift)
    torch.testing.assert_close(moved[..., first:last], now[..., first:last], atol=2e-3, rtol=0)
    outside = torch.cat([moved[..., :first], moved[..., last:]], dim=-1)
    assert outside.numel() and not outside.round(decimals=4).any()
    assert (then - now).abs().amax() > 0.2


def test_a_fault_takes_the_last_moments_and_no_others():
    """Standing, each moment shows another colour: what is copied tells which moment was read."""
    tone = lambda step: torch.full((3, *SIZE), 1.0 + step)  # noqa: E731
    model, window = along_the_wall(*[(0, 0)] * 4, history_of=tone)  # the present is 4
    which = [Scenario(f"{lost}", LEFT, lost) for lost in range(5)] + [Scenario("no history", LEFT, history=False)]
    figures = figures_of(model, window, *which)
    for lost, copied in enumerate((3.0, 2.0, 1.0)):
        for method in ("copy", "warp"):
            assert figures[f"{lost}", method].relative_l2 == pytest.approx((4 - copied) / 4, rel=1e-4)
    for scenario in ("3", "4", "no history"):  # nothing is left to copy: black stays
        assert {figures[scenario, method].relative_l2 for method in ("none", "zeros", "copy", "warp")} == {1.0}


class Spy(nn.Module):
    """Stage 1 that keeps what it was given."""

    stride, every_scale = STRIDE, False

    def __init__(self):
        super().__init__()
        self.new_history = partial(HistoryQueue, 4)

    def complete(self, features, missing, frame, history, **_):
        self.seen = [past.available[0].tolist() for past in history.frames]
        return features, torch.zeros_like(missing)


@pytest.mark.parametrize("lost, there", [(0, [1, 1, 1]), (1, [0, 1, 1]), (2, [0, 0, 1]), (3, [0, 0, 0])])
def test_the_cascade_is_told_which_moments_are_lost(lost, there):
    model, window = along_the_wall(*[(0, 0)] * 4)
    model.temporal = Spy()
    figures_of(model, window, Scenario("", LEFT, lost))
    assert model.temporal.seen == [
        [True, bool(was_there), True, True, True, True] for was_there in there
    ]  # newest first
    figures_of(model, window, Scenario("", LEFT, lost, history=False))
    assert model.temporal.seen == []


def test_figures_are_what_their_definitions_say():
    """One camera is filled with its last features, twice the true ones in one half of the cells."""
    x = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(4)) + 0.5
    factor = torch.ones(SIZE)
    factor[:, ::2] = 2.0
    model, window = along_the_wall((0, 0), (0, 0), history_of=lambda step: x if step else x * factor)
    usual = [torch.full((6, 3, *SIZE), 0.7)]
    figures = figures_of(model, window, Scenario("now", LEFT), constant=usual)
    error, of_usual = (x * (factor - 1)).square().sum(), (x - 0.7).square().sum()
    copied = figures["now", "copy"]
    assert copied.relative_l2 == pytest.approx(float((error / x.square().sum()).sqrt()), rel=1e-5)
    assert copied.explained == pytest.approx(float(1 - error / of_usual), rel=1e-5) and copied.cosine > 1 - 1e-6
    assert figures["now", "constant"].explained == pytest.approx(0, abs=1e-6)
    assert figures["now", "zeros"].explained == pytest.approx(float(1 - x.square().sum() / of_usual), rel=1e-5)
    assert math.isnan(figures_of(model, window, Scenario("now", LEFT))["now", "copy"].explained)


def test_the_constant_is_the_mean_over_training_samples():
    model, _ = along_the_wall((0, 0))
    features = torch.rand(5, 6, 3, *SIZE)
    images = image_of(features)
    (mean,) = training_mean(model, [images[:2], images[2:]])
    torch.testing.assert_close(mean, features.mean(0))
    with pytest.raises(ValueError, match="no images"):
        training_mean(model, [])


def test_the_experiments_constant_is_that_of_its_unaugmented_training_moments():
    made = experiment("completion_v2_tiny")
    made.data.scenes, made.data.image_size, made.data.resize = (1, 1), (32, 64), (1.5, 2.0)
    made.constant_samples = 4
    network = made.build_model()
    training = Windows(made.build_data()[0].drives, replace(made.data, history=0, resize=(1.0, 1.0)), training=False)
    assert len(training) == 40
    moments = made.collate([training[0, index] for index in (0, 10, 20, 30)]).to("cpu").images[:, 0]
    with torch.no_grad():
        expected = [x.mean(0) for x in network.eval().extract(moments)]
    for got, wanted in zip(made.constant(network), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_experiments_figures_are_means_over_cameras_and_scales():
    made = experiment("completion_v2_tiny")
    made.data.scenes, made.data.image_size, made.constant_samples = (1, 1), (32, 64), 8
    made.evaluate_without = ("CAM_FRONT", "CAM_BACK")
    network = made.build_model()
    validation = made.build_data()[1]
    batches = [made.collate([validation[0, index]]).to("cpu") for index in (0, 9)]
    figures = made.evaluate(network, batches)
    assert set(figures) == set(made.figure_names())
    scores = evaluate_completion(
        network, batches, [Scenario(c, (c,)) for c in made.evaluate_without], constant=made.constant(network)
    )
    completed = [s for s in scores if s.method == "completed"]
    mean = lambda values: pytest.approx(sum(values) / len(values), rel=1e-5)  # noqa: E731
    assert len(completed) == 4 and figures["relative_l2"] == mean([s.relative_l2 for s in completed])
    assert figures["explained"] == mean([s.explained for s in completed])
    assert figures["explained/CAM_BACK"] == mean([s.explained for s in completed if s.scenario == "CAM_BACK"])
    assert figures["explained/8"] == mean([s.explained for s in completed if s.stride == 8])
    of_constant = [s.relative_l2 for s in scores if s.method == "constant"]
    assert figures["relative_l2_constant"] == mean(of_constant)


# ---- on the built-in drive


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
    assert scores["copy"].relative_l2 > 0.3 and scores["copy"].cosine < 0.99
    assert scores["copy"].corridor_relative_l2 != scores["copy"].corridor_relative_l2  # NaN: no path behind the car
