"""Options of the cascade: stages side by side, who guides stage 3, what stage 2 fills, consistency in time."""

import pytest
import torch

from rigfuse.modules.completion.fusion import ConfidenceFusion
from rigfuse.modules.completion.motion import repeated_motion
from rigfuse.modules.rig import ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.window import RigWindow
from rigfuse.train.data import open_drives
from rigfuse.train.systems import experiment
from support.networks import with_noise

FRONT, FRONT_LEFT, BACK = 0, 1, 5
SIZE = (96, 160)


def cascade(name="completion_v2_tiny", **settings):
    torch.manual_seed(0)
    made = experiment(name)
    for key, value in settings.items():
        setattr(made.model, key, value)
    model = made.build_model()
    model.backbone.requires_grad_(False)
    for stage in (model.temporal, model.planning, model.fusion):
        if stage is not None:
            with_noise(stage)
    return model.eval()


def moments(count, *, standing=False):
    rig = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.1, crop=(0, -6, SIZE[1], SIZE[0])))
    drive, frames = open_drives(None)[0], []
    for step in range(count):
        frame = drive[0 if standing else step].frame
        frames.append(RigFrame(rig.image_T_ego[None], frame.world_T_ego, frame.timestamp + 0.5 * step, frame.scene))
    return frames


def window(count=3, **settings) -> RigWindow:
    images = torch.randn(1, 1 if settings else count, 6, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return RigWindow(images.expand(-1, count, -1, -1, -1, -1), moments(count, **settings), torch.zeros(1, 6, 2))


# ---- side by side


def test_confidence_begins_equal_and_chooses_cell_by_cell():
    fusion, maps = ConfidenceFusion(8, 2), [torch.randn(3, 8, 4, 5) for _ in range(2)]
    torch.testing.assert_close(fusion(maps), (maps[0] + maps[1]) / 2)
    with torch.no_grad():
        fusion.confidence[1][-1].bias.fill_(100.0)
    torch.testing.assert_close(fusion(maps), maps[1])
    (with_noise(fusion)(maps) - maps[0]).square().sum().backward()
    # the last bias of every branch but one is free: only differences count
    assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())


def test_stages_side_by_side_see_what_came_in_and_train():
    model, batch = cascade("completion_v2_parallel_tiny"), window()
    original, missing = model.extract(batch.images[:, -1]), torch.zeros(1, 6, dtype=torch.bool)
    missing[0, FRONT] = True
    history = model.temporal.new_history()
    history.push(model.for_temporal(original), missing & False, batch.frames[0])
    completed, _, _ = model.complete(original, missing, batch.frames[1], history)
    alone = model.planning(original, missing, batch.frames[1])[0]
    for scale, (x, before) in enumerate(zip(completed, original)):
        assert torch.equal(x[~missing], before[~missing])
        for branch in (0, 1):  # all confidence in one stage gives that stage's result
            with torch.no_grad():
                for index, part in enumerate(model.fusion[scale].confidence):
                    part[-1].bias.fill_(1e4 if index == 2 - branch else 0.0)
            found = model.complete(original, missing, batch.frames[1], history)[0][scale]
            expected = alone if branch == 0 else model.vae(original, missing, [missing] * len(original))[0]
            torch.testing.assert_close(found[0, FRONT], expected[scale][0, FRONT], atol=1e-4, rtol=1e-4)
    output = model.train()(batch, drop=["CAM_FRONT"])
    sum(output.losses.values()).backward()
    assert set(output.losses) >= {"ssl", "vae_rec", "vae_kl"}
    assert all(p.grad is not None for p in model.fusion.parameters())
    nobody = model.eval()(batch, drop=[])
    assert all(torch.equal(a, b) for a, b in zip(nobody.features, nobody.original))


# ---- the trajectory of stage 3


def test_motion_that_goes_on():
    """A turn of a tenth of a radian and three metres ahead at each step; standing still; another scene."""
    step = torch.eye(4, dtype=torch.float64)
    angle = torch.tensor(0.1, dtype=torch.float64)
    step[:2, :2] = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    step[0, 3] = 3.0
    poses = [torch.eye(4, dtype=torch.float64)]
    for _ in range(5):
        poses.append(poses[-1] @ step)
    views = torch.eye(4, dtype=torch.float64).expand(1, 1, 4, 4)
    frames = [
        RigFrame(views, p[None], torch.tensor([float(t)], dtype=torch.float64), ("a",)) for t, p in enumerate(poses)
    ]
    path = repeated_motion(frames[0], frames[1], 4)
    expected = [(torch.linalg.inv(poses[1]) @ pose)[:2, 3] for pose in poses[2:]]
    torch.testing.assert_close(path[0].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert not repeated_motion(frames[0], frames[0], 4).any() and repeated_motion(None, frames[0], 4) is None
    other = RigFrame(views, poses[0][None], frames[0].timestamp, ("b",))
    assert repeated_motion(other, frames[1], 4).isnan().all()


@pytest.mark.parametrize("source, training, evaluation", [("none", 0, 0), ("ground_truth", 1, 0), ("predicted", 1, 1)])
def test_who_guides_stage_3(source, training, evaluation):
    model, batch = cascade("completion_v2_planning_tiny"), window()
    model.trajectory_source, model.trajectory_dropout = source, 0.0
    for mode, guided in ((True, training), (False, evaluation)):
        assert (model.train(mode)(batch, drop=["CAM_FRONT"]).importance is not None) == bool(guided)
    if source == "predicted":  # a running rig predicts the same
        missing = torch.zeros(1, 6, dtype=torch.bool)
        for step in range(3):
            missing[0, FRONT] = step == 2
            streamed = model.stream(batch.images[:, step], missing, batch.frames[step])
        for a, b in zip(streamed, model(batch, drop=["CAM_FRONT"]).features):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---- stage 2 and time


def test_stage_2_fills_what_has_no_history_at_inference_unless_it_is_left_out_there():
    batch = window(1)
    for name, fills in (("completion_v2_documents_tiny", False), ("completion_v2_tiny", True)):
        model = cascade(name)
        model.planning = None
        output = model(batch, drop=["CAM_BACK"])
        assert [not torch.equal(a, b) for a, b in zip(output.features, output.original)] == [fills] * 2


def faults(*moments):
    """CAM_FRONT missing at these of three moments."""
    mask = torch.zeros(1, 3, 6, dtype=torch.bool)
    mask[0, list(moments), FRONT] = True
    return mask


@pytest.mark.parametrize("name", ["completion_v2_tiny", "completion_v3_tiny"])
def test_consistency_holds_lasting_faults_to_the_moment_before(name):
    model = cascade(name, consistency=True).train()
    moving = model(window(), drop=faults(1, 2)).losses["temporal"]
    assert moving > 1e-3 and moving.requires_grad
    assert model(window(), drop=faults(2)).losses["temporal"] == 0  # it was there a moment ago
    assert model(window(1), drop=["CAM_FRONT"]).losses["temporal"] == 0
    moving.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.temporal.parameters())


def test_a_standing_rig_that_sees_the_same_is_consistent():
    """What V3 completes from its neighbours alone is the same in both moments."""
    model = cascade("completion_v3_tiny", consistency=True).train()
    model.temporal.moments = 0
    model.temporal.attention.out.weight.data.zero_()  # which also sees how old a source is
    still = model(window(standing=True), drop=faults(0, 1, 2)).losses["temporal"]
    moving = model(window(), drop=faults(0, 1, 2)).losses["temporal"]
    assert still < 0.05 * moving
