"""V3: which sources a missing camera has, where its cells lie in them, and what the stage makes of both."""

import pytest
import torch

from rigfuse.modules.completion.sources import hypothesize, list_sources
from rigfuse.modules.completion.stage import TemporalConfig
from rigfuse.modules.completion.temporal_v3 import MotionCompensatedTemporalCompletionV3 as V3
from rigfuse.modules.history import HistoryFrame, HistoryQueue
from rigfuse.modules.rig import NUSCENES_CAMERAS, ImageAugmentation, RigFrame, nuscenes_like_rig
from rigfuse.modules.topology import Topology
from rigfuse.train.data import open_drives
from support.networks import with_noise
from support.wall import DISTANCE, STRIDE, wall_frame

FRONT, FRONT_LEFT, FRONT_RIGHT, BACK_LEFT, BACK_RIGHT, BACK = range(6)
WIDTH, HEIGHT = 416, 256
STRIDES, SIZES = (16, 32), ((16, 26), (8, 13))
NEIGHBOURS = Topology.named("neighbours").table(NUSCENES_CAMERAS)


@pytest.fixture(scope="module")
def frames() -> list[RigFrame]:
    """Four consecutive moments of a batch of two drives."""
    rig = nuscenes_like_rig().augmented(ImageAugmentation(resize=WIDTH / 1600, crop=(0, -22, WIDTH, HEIGHT)))
    views, made = rig.image_T_ego.expand(2, -1, -1, -1), []
    for index in range(4):
        frame = RigFrame.cat([drive[index].frame for drive in open_drives(None)[:2]])
        made.append(RigFrame(views, frame.world_T_ego, frame.timestamp, frame.scene))
    return made


def missing_cameras(*pairs, samples=2):
    mask = torch.zeros(samples, 6, dtype=torch.bool)
    for sample, camera in pairs:
        mask[sample, camera] = True
    return mask


NOBODY = missing_cameras()


def small(topology="neighbours", **settings):
    config = dict(
        heads=2, queue_length=2, kv_downsample=2, stride=32, depths=(4.0, 10.0, 40.0), topology=topology, grid=(8, 13)
    )
    return V3(32, STRIDES, TemporalConfig(**config | settings)).eval()


def maps(**like):
    return [torch.randn(2, 6, 32, *size, **like) for size in SIZES]


def run(module, frames, history, present, missing, was_missing=NOBODY):
    module.reset_history()
    for frame, features in zip(frames, history):
        module(features, was_missing, frame)
    return module(present, missing, frames[len(history)])


# ---- sources


def test_the_newest_moments_of_each_listed_camera_and_the_present_of_its_neighbours(frames):
    """FRONT of sample 0 and BACK of sample 1 are missing; FRONT was there in the oldest moment alone."""
    available = [missing_cameras(*gone).logical_not() for gone in ([(0, FRONT)], [(0, FRONT), (1, BACK_LEFT)], [])]
    past = [HistoryFrame(None, there, frame) for there, frame in zip(available, frames[2::-1])]
    sources = list_sources(missing_cameras((0, FRONT), (1, BACK), (1, BACK_LEFT)), frames[3], past, NEIGHBOURS, 2)
    assert sources.sample.tolist() == [0, 1, 1] and sources.camera.tolist() == [FRONT, BACK_LEFT, BACK]

    def found(row):
        """(how many moments ago, camera) of the maps that a missing one may look at."""
        chosen = sources.maps[sources.index[row][sources.index[row] >= 0]]
        assert (chosen % 12 // 6 == sources.sample[row]).all()
        return {(int(m) // 12, int(m) % 6) for m in chosen}

    now = {(0, FRONT_LEFT), (0, FRONT_RIGHT)}
    assert found(0) == now | {(3, FRONT)} | {(t, c) for t in (1, 2) for c in (FRONT_LEFT, FRONT_RIGHT)}
    assert found(2) == {(0, BACK_RIGHT)} | {(t, c) for t in (1, 2) for c in (BACK, BACK_RIGHT)} | {
        (1, BACK_LEFT),
        (3, BACK_LEFT),
    }
    used = sources.index >= 0
    ages = frames[3].timestamp[0] - torch.stack([frames[3 - t].timestamp[0] for t in range(4)])
    assert torch.equal(sources.age[0][used[0]], ages[sources.maps[sources.index[0][used[0]]] // 12])
    assert set(sources.kind[0][used[0]].tolist()) == {0, 1, 2}


def test_cells_lie_where_their_points_are_seen(frames):
    """Against projections of points one by one, at a depth and on the ground, for another camera at another time."""
    past = [HistoryFrame(None, ~NOBODY, frames[1])]
    sources = list_sources(missing_cameras((1, FRONT_LEFT)), frames[2], past, NEIGHBOURS, 1)
    found = hypothesize(sources, torch.tensor([7.0]), SIZES[1], 32, SIZES[0], 16)
    slot = (sources.maps[sources.index[0]] == 12 + 6 + FRONT).nonzero().item()  # what FRONT saw a moment ago
    now, then, compared = frames[2].image_T_ego[1, FRONT_LEFT], frames[1].image_T_ego[1, FRONT], 0
    for v, u in torch.cartesian_prod(torch.arange(1, SIZES[1][0], 2), torch.arange(SIZES[1][1])).tolist():
        pixel = torch.tensor([(u + 0.5) * 32 - 0.5, (v + 0.5) * 32 - 0.5, 1.0], dtype=torch.float64)
        ray = torch.linalg.inv(now[:3, :3]) @ pixel
        centre = -torch.linalg.inv(now[:3, :3]) @ now[:3, 3]
        for hypothesis, depth in ((0, 7.0), (1, -float(centre[2] / ray[2]))):
            if depth <= 0:
                assert not found.seen[0, slot, 1, v, u] and found.ground[0, v, u] == torch.inf
                continue
            point = torch.cat([centre + depth * ray, torch.ones(1)])
            then_point = torch.linalg.inv(frames[1].world_T_ego[1]) @ frames[2].world_T_ego[1] @ point
            x, y, z, _ = then @ then_point
            place = torch.stack([x / z + 0.5, y / z + 0.5]) / 16 - 0.5
            inside = bool(z > 0.1 * (depth if hypothesis else 1)) and bool((place > -0.5).all())
            inside = inside and bool(place[0] < SIZES[0][1] - 0.5) and bool(place[1] < SIZES[0][0] - 0.5)
            assert found.seen[0, slot, hypothesis, v, u] == inside
            if inside:
                unit = found.depths[hypothesis]
                p = found.projection[0, slot, hypothesis] @ torch.tensor([u * unit, v * unit, unit, 1.0])
                torch.testing.assert_close((p[:2] / p[2]).double(), place, atol=2e-3, rtol=0)
                compared += 1
            if hypothesis:
                assert found.ground[0, v, u] == pytest.approx(depth, rel=1e-4)
    assert compared > 25


# ---- along a wall that all six cameras face


def on_the_wall(cells, *, own=True):
    """FRONT is missing after a drive of some cells; what it and the others show there, and what stage 1 makes of it."""
    size = (4, 12)
    wall = torch.rand(3, 1, 40, generator=torch.Generator().manual_seed(2)) + 0.5
    shown = [
        wall[..., 10 + c : 10 + c + size[1]].expand(1, 6, 3, *size).repeat(1, 1, 11, 1, 1)[:, :, :32]
        for c in (0, cells)
    ]
    config = TemporalConfig(heads=2, kv_downsample=2, stride=STRIDE, depths=(DISTANCE,), topology="neighbours")
    module = V3(32, (STRIDE,), config).eval()
    with torch.no_grad():
        module.gate[0][-1].bias.fill_(100.0)  # takes all that was completed
        module.steer[-1].bias[-1] = -100.0  # nothing is usual …
        module.steer[-1].bias[module.hypotheses - 1] = -100.0  # … and nothing moves with the rig
    missing = missing_cameras((0, FRONT), samples=1)
    others = missing_cameras((0, FRONT_LEFT), (0, FRONT_RIGHT), samples=1) if own else missing
    module([shown[0]], others & False if own else missing, wall_frame(0, size))
    absent = missing | others if own else missing
    present = torch.where(absent[:, :, None, None, None], 0, shown[1])
    return module([present], absent, wall_frame(cells, size, time=0.5))[0][0, FRONT], shown[1][0, FRONT]


@pytest.mark.parametrize("cells", [0, 1, -3])
def test_the_own_past_comes_to_where_it_is_now(cells):
    """The neighbours are missing now, and their past is that of the same wall."""
    completed, true = on_the_wall(cells)
    first, last = max(0, -cells), 12 - max(0, cells)
    torch.testing.assert_close(completed[..., first:last], true[..., first:last], atol=2e-3, rtol=0)


def test_a_present_neighbour_fills_what_nobody_saw_before():
    """FRONT was never there; its neighbours look at the same wall, so every cell is known."""
    completed, true = on_the_wall(5, own=False)
    torch.testing.assert_close(completed[..., 7:], true[..., 7:], atol=2e-3, rtol=0)


# ---- on the built-in drives


def test_the_newer_of_two_moments_counts_more_by_its_age():
    """A standing camera that showed ones once and nothing otherwise: e⁻¹ less for each second further back."""
    module = V3(32, (STRIDE,), TemporalConfig(topology="own", heads=2, stride=STRIDE, moments=2, grid=(3, 12))).eval()
    torch.nn.init.constant_(module.gate[0][-1].bias, 100.0)
    ones, nothing, found = torch.ones(1, 6, 32, 3, 12), torch.zeros(1, 6, 32, 3, 12), []
    for history in ([ones, nothing], [nothing, ones]):
        module.reset_history()
        for time, features in enumerate(history):
            module([features], missing_cameras(samples=1), wall_frame(0, (3, 12), time=float(time)))
        last = wall_frame(0, (3, 12), time=2.0)
        found.append(module([nothing], missing_cameras((0, FRONT), samples=1), last)[0][0, FRONT, :, 1, 6])
    torch.testing.assert_close(found[1], found[0] * torch.e, rtol=1e-3, atol=0)


def test_only_missing_cameras_change_and_every_one_of_them(frames):
    features, missing = maps(), missing_cameras((0, FRONT), (1, BACK), (1, BACK_LEFT))
    completed = run(with_noise(small()), frames, [maps()], features, missing)
    for before, after in zip(features, completed):
        assert torch.equal(after[~missing], before[~missing])
        assert (after[missing] - before[missing]).abs().flatten(1).amax(1).gt(1e-3).all()
    unchanged = run(with_noise(small()), frames, [maps()], features, NOBODY)
    assert all(torch.equal(a, b) for a, b in zip(unchanged, features))
    disabled = small(enable=False)
    assert all(torch.equal(a, b) for a, b in zip(run(disabled, frames, [maps()], features, missing), features))


def test_what_is_usual_fills_what_nobody_sees(frames):
    """The mean of what each camera showed in each cell while it was present in training, at every scale."""
    module, missing = small("own", grid=SIZES[0]), missing_cameras((0, FRONT), (1, BACK))
    for gate in module.gate:
        torch.nn.init.constant_(gate[-1].bias, 100.0)
    batches, gone = [maps() for _ in range(3)], [NOBODY, NOBODY, missing_cameras((0, BACK))]
    for batch, absent in zip(batches, gone):
        module.train().complete(batch, absent, frames[0], module.new_history())
    for scale, completed in enumerate(module.eval()(maps(), missing, frames[0])):
        for sample, camera in ((0, FRONT), (1, BACK)):
            means = [b[scale][~g[:, camera], camera].mean(0) for b, g in zip(batches, gone)]
            torch.testing.assert_close(completed[sample, camera], sum(means) / 3, atol=1e-5, rtol=1e-4)


def test_what_is_usual_stays_and_the_rest_moves():
    """A source that shows nothing but what is usual says so, wherever the rig went; a standing rig is unmoved by it."""
    frames = [wall_frame(cells, (4, 12), time=0.5 * index) for index, cells in enumerate((0, 0, 3))]
    config = TemporalConfig(heads=2, kv_downsample=2, stride=STRIDE, depths=(DISTANCE,), grid=(4, 12))
    module, missing = V3(32, (STRIDE,), config).eval(), missing_cameras((0, FRONT), samples=1)
    usual, unusual = torch.randn(6, 32, 4, 12), torch.randn(1, 6, 32, 4, 12)
    with torch.no_grad():
        module.usual.means.copy_(usual)
        module.gate[0][-1].bias.fill_(100.0)
        module.steer[-1].bias[-1] = -100.0
    for frame, extra in ((frames[1], 0), (frames[2], 0), (frames[1], unusual[:, :1])):
        module.reset_history()
        module([usual[None] + extra], missing & False, frames[0])
        (completed,) = module([usual[None] + extra], missing, frame)
        torch.testing.assert_close(completed, usual[None] + extra, atol=2e-3, rtol=1e-3)


def test_who_was_missing_or_is_not_listed_is_not_read(frames):
    module, features, missing = with_noise(small()), maps(), missing_cameras((0, FRONT))
    history = maps()
    gone = missing_cameras((0, FRONT_LEFT))
    first = run(module, frames, [history], features, missing, gone)
    for camera, when, matters in [
        (FRONT_LEFT, "past", False),  # missing then
        (BACK, "past", False),  # no neighbour
        (BACK, "now", False),
        (FRONT_RIGHT, "past", True),
        (FRONT_LEFT, "now", True),
        (FRONT, "past", True),
    ]:
        changed = [x.clone() for x in (history if when == "past" else features)]
        for x in changed:
            x[0, camera] += 1
            x[1] += 1  # the other sample
        past, now = (changed, features) if when == "past" else (history, changed)
        again = run(module, frames, [past], now, missing, gone)
        assert [torch.equal(a[0, FRONT], b[0, FRONT]) for a, b in zip(again, first)] == [not matters] * 2, (
            camera,
            when,
        )


def test_gradients_reach_every_parameter_and_the_present_neighbours(frames):
    module, missing = with_noise(small()), missing_cameras((0, FRONT), (1, BACK))
    history, features = maps(requires_grad=True), maps(requires_grad=True)
    completed = run(module, frames, [history], features, missing)
    kept = torch.randn_like(completed[0])
    ((completed[0] * kept).sum() + completed[1].square().sum()).backward()
    for name, parameter in module.named_parameters():
        # a bias of the keys shifts every score of a query alike, and the softmax does not see it
        if name != "attention.key.bias":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(x.grad is None for x in history)
    through = features[0].grad[0, FRONT_LEFT] - kept[0, FRONT_LEFT]
    assert through.abs().max() > 1e-3  # besides what passes by


def test_pooled_whole_numbers_stay_close(frames):
    history, features, missing = [maps(), maps()], maps(), missing_cameras((0, FRONT))
    smooth = [
        [torch.nn.functional.avg_pool2d(x.flatten(0, 1), 5, 1, 2).unflatten(0, (2, 6)) for x in m] for m in history
    ]
    completed = [
        run(with_noise(small(**settings)), frames, smooth, features, missing)
        for settings in ({}, dict(history_dtype="int8"), dict(history_dtype="int8", history_pool=2))
    ]
    for scale in range(2):
        exact, whole, coarse = (x[scale][0, FRONT] for x in completed)
        assert (whole - exact).norm() < 0.01 * exact.norm() and 0 < (coarse - exact).norm() < 0.3 * exact.norm()


def test_history_in_whole_numbers_has_a_scale_for_each_map_and_channel(frames):
    features = torch.randn(2, 6, 4, 8, 9) * torch.logspace(-3, 3, 4)[:, None, None]
    queue = HistoryQueue(1, torch.int8)
    queue.push(features, NOBODY, frames[0])
    (past,) = queue.frames
    assert past.stored.dtype == torch.int8
    error = (past.features - features).square().mean((-1, -2)).sqrt() / features.square().mean((-1, -2)).sqrt()
    assert error.max() < 0.012
    assert torch.equal(past.maps(torch.tensor([7])), past.features[1, 1][None])


def test_backends_agree(frames):
    """Tightly where no sampled place lies on a border of cells."""
    history, features, missing, completed = [maps()], maps(), missing_cameras((0, FRONT), (1, BACK)), []
    for backend in ("torch", "definition"):
        module = with_noise(small())
        module.backend = backend
        completed.append(run(module, frames, history, features, missing))
    for a, b in zip(*completed):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_autocast_stays_close(frames):
    history, features, missing = [maps()], maps(), missing_cameras((0, FRONT))
    module = with_noise(small()).train()
    expected = run(module, frames, history, features, missing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completed = run(module, frames, history, features, missing)
    for a, b in zip(completed, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.3, rtol=0.1)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"stride is 8, needs one of the scales' \(16, 32\)"):
        small(stride=8)
    with pytest.raises(ValueError, match=r"needs \(B, 6, 32, H, W\)"):
        small()([torch.zeros(2, 5, 32, 4, 4)] * 2, NOBODY, None)
