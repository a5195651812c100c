"""Static BEV as an experiment: labels, windows, both steps with and without the cache, refusals."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rigfuse.modules.lidar.second import LidarConfig
from rigfuse.modules.poses import rigid, rotation_z
from rigfuse.modules.static_bev.grid import BevGrid, GridConfig
from rigfuse.modules.static_bev.head import HeadConfig
from rigfuse.train import main as program
from rigfuse.train.config import check
from rigfuse.train.data import open_drives
from rigfuse.train.data.dataset import read_images
from rigfuse.train.distributed import World
from rigfuse.train.systems import experiment
from rigfuse.train.systems.static_bev import data
from rigfuse.train.systems.static_bev.evaluate import EvaluationConfig, Judged, Streamer, measure
from rigfuse.train.systems.static_bev.report import NO_LOSS, comparison
from rigfuse.train.systems.static_bev.truth import StaticMap, labels_of
from rigfuse.train.tools import report_static_bev
from rigfuse.train.trainer import Trainer

shapely = pytest.importorskip("shapely")
INTERVALS = (0.5, 1.0)
GRID = BevGrid((-10.4, 31.2), (-11.2, 11.2), 0.2)


def settings(step, world, weights=None):
    made = experiment(f"static_bev_step{step}_tiny")
    model, data, run = made.model, made.data, made.run
    data.root, data.image_size, data.p_lost = str(world), (32, 64), 1.0
    model.grid = GridConfig((-6.4, 12.8), (-6.4, 6.4), cell=0.8, upsample=2)
    model.channels, model.image_channels, model.head.channels = 8, 8, 8
    model.history.intervals, model.weights = INTERVALS, weights
    made.loader.batch_size, run.epochs, run.log_steps, run.tensorboard = 1, 1, 1, False
    made.evaluation.constant_samples, made.evaluation.every, data.remember = 2, 1, 0
    return made


@pytest.fixture(scope="module")
def step1(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step1")
    Trainer(settings(1, small_world), folder, World()).fit()
    return str(folder / "checkpoints" / "last.pt")


def test_labels_are_those_of_the_markings(small_world):
    moment = open_drives(small_world)[0][0]
    folder, file = Path(small_world) / "maps", f"{moment.location}.json"
    markings = json.loads((folder / "markings" / file).read_text())
    here = moment.world_T_ego[:2, 3].numpy()
    slot = min(markings["parking_slots"], key=lambda row: np.hypot(*(row["center"] - here)))
    pose = torch.from_numpy(rigid(rotation_z(slot["yaw"]), [*slot["center"], 0]))  # on the slot, along it
    head = HeadConfig()
    ground = StaticMap.load(small_world, moment.location, head).around(pose, GRID)
    own = ground.instances[np.hypot(*ground.instances[:, :2].T).argmin()]
    assert np.allclose(own, [0, 0, *slot["size"], 0, 2], atol=1e-3)
    assert ground.lanes_known.all() and ground.road_known.all() and len(ground.lines) and (ground.labels >= 0).all()
    labels = labels_of(ground, GRID, head, 0.4)
    v, u = (int(x) for x in GRID.cells(torch.zeros(2)).round().flip(0))
    assert labels.road[0, 3, v, u] == 255 and not labels.unknown_lanes.any()
    drawn = [(labels.lanes[0, label] >= 128).sum().item() for label in range(9)]
    length = [
        sum(shapely.intersection(shapely.LineString(line), shapely.box(-10.4, -11.2, 31.2, 11.2)).length
            for line, own in zip(ground.lines, ground.labels) if own == label)
        for label in range(9)
    ]  # fmt: skip
    assert np.allclose(np.array(drawn) * 0.04, np.array(length) * 0.4, rtol=0.1, atol=0.3) and sum(drawn) > 200


def test_without_markings_types_are_nuscenes_words_and_the_rest_is_unknown(small_world):
    moment, head = open_drives(small_world)[0][0], HeadConfig()
    expansion = json.loads((Path(small_world) / "maps" / "expansion" / f"{moment.location}.json").read_text())
    ground = StaticMap(expansion, None, head).around(moment.world_T_ego, GRID)
    assert {*ground.labels.tolist()} <= {-1, 0, 1, 3} and -1 in ground.labels and not len(ground.instances)
    assert ground.lanes_known.sum() == 3 and not ground.instances_known.any()
    assert [*ground.road_known] == [False, True, True, True]
    labels = labels_of(ground, GRID, head, 0.4)
    assert labels.unknown_lanes.any() and labels.road[0, 1].any() and not labels.road[0, 0].any()
    del expansion["lane"]
    with pytest.raises(ValueError, match="the map has no 'lane'; needs nuScenes' map expansion"):
        StaticMap(expansion, None, head)


def test_on_real_maps_it_learns_roads_and_lines_of_unknown_type(nuscenes_root, nuscenes, monkeypatch):
    monkeypatch.setattr(data, "read_images", lambda moment, view: torch.zeros(6, 3, 32, 64, dtype=torch.uint8))
    made = settings(2, nuscenes_root)
    made.model.history.intervals = (0.5, 2.0, 3.5)
    drive = next(drive for drive in nuscenes if drive.name == "scene-0103")
    training, validation = (data.StaticSamples([drive], made.data, each, 0, made.model) for each in (True, False))
    batch = made.collate([training[0, 10]]).to("cpu")
    assert not batch.truth.instances_known.any() and batch.truth.unknown_lanes.any()
    assert all((batch.truth.road[0, place] == 255).any() for place in (1, 2, 3))
    model = made.build_model()
    model.set_cameras(training.names)
    output = model(batch)
    assert output.figures["history/found"] == 1 and output.losses["lane_focal"] > 0 and output.losses["heat"] == 0
    sum(output.losses.values()).backward()
    assert model.head.lanes[-1].bias.grad[:2].all() and not model.head.lanes[-1].bias.grad[4:].any()
    batches = [made.collate([validation[0, index] for index in (10,)]).to("cpu")]
    constant = torch.zeros(13, *validation.grid.shape)
    measured = measure(model.eval(), batches, made.evaluation, validation.names, constant)
    series, figures = measured.own.series.figures(), measured.figures()
    assert series["Other", "all", 0.7].support == series["any", "all", 0.7].support > 10
    assert {"iou_best/Road", "iou_best/Curb", "series/f1_any"} <= figures.keys() and "iou/Wall" not in figures


def test_step_2_from_the_cache_is_step_2_without_it(small_world, step1, tmp_path):
    plain, cached = settings(2, small_world, step1), settings(2, small_world, step1)
    plain.model.fusion.kind = cached.model.fusion.kind = "gate"
    cached.data.cache = str(tmp_path / "cache")
    cached.evaluation.pictures, cached.evaluation.picture_steps = 1, 3
    sets = plain.build_data()[0], cached.build_data()[0]
    assert sets[0].past(2) == [0, 1] and sets[0].past(0) == [None, None]
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    model = plain.build_model().eval()
    model.set_cameras(sets[0].names)
    torch.nn.init.normal_(model.fusion.block[0].weight, std=0.1)
    for index in range(3):
        first, second = (
            model(each.collate([each_set[0, index]]).to("cpu")) for each, each_set in zip((plain, cached), sets)
        )
        for name, loss in first.losses.items():
            assert loss.item() == pytest.approx(second.losses[name].item(), rel=0.02), name
        assert first.figures == second.figures and first.figures["history/found"] == index / 2
    folder = tmp_path / "run"
    trainer = Trainer(cached, folder, World())
    trainer.fit()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == files  # nothing was computed again
    before = torch.load(step1, weights_only=True)["model"]
    after = trainer.model.state_dict()
    frozen = [name for name in before if name.split(".")[0] in ("cameras", "view")]
    assert all(torch.equal(before[name], after[name]) for name in frozen) and len(frozen) > 50
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("head."))
    figures = json.loads((folder / "result.json").read_text())["figures"]
    assert {"iou", "iou_best", "constant/iou_best", "series/f1_any", "history/found"} <= figures.keys()
    assert figures["history/found"] == pytest.approx((0 + 0.5 + 1) / 3)
    drawn = sorted(path.name for path in (folder / "pictures").iterdir())
    assert len(drawn) == 2 and drawn[-1] == "training-00000000.png"
    out = tmp_path / "report"
    options = ["--lose", "CAM_FRONT", "--pictures", "1", "--untrained", "--out", str(out)]
    assert report_static_bev.main([str(folder), *options]) == 0
    text, rows = (out / "report.md").read_text(), json.loads((out / "figures.json").read_text())
    assert [row["lost"] for row in rows] == 2 * ["no loss", "CAM_FRONT"] and len(list(out.glob("run-*.png"))) == 1
    assert [row["run"] for row in rows] == ["untrained", "untrained", "run", "run"]
    assert rows[2]["figures"]["iou_best"] == pytest.approx(figures["iou_best"], abs=0.02)
    assert "### far; recall" in text and "| WideSolidLine | 0 | n/a |" in text and "| CAM_FRONT | " in text
    cached.optim.freeze_until = {"cameras": 10**6}
    with pytest.raises(ValueError, match="data.cache needs view frozen for all 3 steps"):
        cached.build_data()


def test_the_cache_holds_what_the_network_sees_in_training(small_world, step1, tmp_path):
    """To the bit, in the precision of the run."""
    made, caches = settings(2, small_world, step1), {}
    made.data.cache = str(tmp_path / "cache")
    for amp in ("float32", "bfloat16"):
        made.run.amp = amp
        training = made.build_data()[0]
        caches[amp] = training.features.read(training.moment(0).token)[0]
    model = made.build_model().eval()
    model.set_cameras(training.names)
    training.features, training.training = None, False  # so that a sample is images, drawn as they are
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = model.see(training.read(0, np.random.default_rng(0)).to("cpu").observations[-1])[0][0]
    assert seen.dtype == torch.bfloat16 and not torch.equal(caches["float32"], caches["bfloat16"])
    assert torch.equal(seen, caches["bfloat16"])


def test_what_is_remembered_is_read_once_and_the_same(small_world, monkeypatch):
    made = settings(1, small_world)
    made.data.shift = False
    plain = made.build_data()[0]
    made.data.remember, reads = 3, []
    kept = made.build_data()[0]
    monkeypatch.setattr(data, "labels_of", lambda *given: reads.append(None) or labels_of(*given))
    monkeypatch.setattr(data, "read_images", lambda *given: reads.append(None) or read_images(*given))
    for epoch in range(2):
        one, other = plain[epoch, 1], kept[epoch, 1]
        assert torch.equal(one.images, other.images) and torch.equal(one.truth.road, other.truth.road)
        assert not one.visible.all() and torch.equal(one.visible, other.visible)
    assert len(reads) == 4 + 2


def test_seeds_share_a_column_of_the_comparison():
    cells = {}
    for seed, (without, past) in enumerate(((0.1, 0.2), (0.3, 0.6))):
        for lost, off in ((NO_LOSS, 0.0), ("CAM_FRONT", 0.1), ("CAM_BACK", 0.3)):
            cells[f"without-{seed}", lost] = {"iou": without - off, "constant/iou": 0.05}
            cells[f"with-{seed}", lost] = {"iou": past - off}
    cells["untrained", NO_LOSS] = cells["untrained", "CAM_FRONT"] = cells["untrained", "CAM_BACK"] = {"iou": 0.01}
    text = comparison(cells)
    assert "| camera lost now | without | with | untrained | mean map | difference |" in text
    assert "| no loss | 0.2000 ± 0.1414 | 0.4000 ± 0.2828 | 0.0100 | 0.0500 | +0.2000 ± 0.1414 |" in text
    assert "| mean of the losses | 0.0000 ± 0.1414 | 0.2000 ± 0.2828 | 0.0100 | 0.0500 | +0.2000 ± 0.1414 |" in text


def test_lidar_alone_trains_in_bfloat16(small_world):
    made = settings(1, small_world)
    made.model.use_cameras, made.model.use_lidar = False, True
    small = dict(channels=(4, 4, 4), blocks=1, second=(4, 4), layers=0)
    made.model.lidar = LidarConfig(voxel_size=(0.2, 0.2, 8.0), frozen_stages=-1, norm_eval=False, **small)
    check(made)
    training, model = made.build_data()[0], made.build_model()
    batch = made.collate([training[0, 0], training[0, 1]]).to("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch).losses
    sum(losses.values()).backward()
    assert batch.observations[0].images is None and model.lidar["voxel_encoder"].linear.weight.grad.any()


def test_a_lost_camera_is_lost_now_or_from_the_start(small_world, step1):
    made = settings(2, small_world, step1)
    validation = made.build_data()[1]
    model = made.build_model().eval()
    model.set_cameras(validation.names)
    torch.nn.init.normal_(model.fusion.block[0].weight, std=0.1)
    batch = made.collate([validation[0, index] for index in range(3)]).to("cpu")

    def maps(**change):
        return [said.maps for said in Streamer(model, validation.names, replace(made.evaluation, **change))(batch)]

    lost = ("CAM_FRONT",)
    whole, now, since = maps(), maps(lost=lost), maps(lost=lost, lost_since="start")
    assert torch.equal(now[0], since[0]) and not torch.equal(now[0], whole[0])  # the first moment has no past
    assert not torch.equal(now[2], since[2])
    some = Streamer(model, validation.names, replace(made.evaluation, lost=lost, every=2))(batch)
    assert some[1] is None and torch.equal(some[2].maps, now[2])  # what is not judged is remembered
    late = Streamer(model, validation.names, replace(made.evaluation, lost=lost, since=0.5, every=2))(batch)
    assert late[0] is late[2] is None and torch.equal(late[1].maps, now[1])  # counted from half a second on
    with pytest.raises(ValueError, match="evaluation.lost names 'CAM_TOP'; the rig has CAM_FRONT, "):
        maps(lost=("CAM_TOP",))


def test_moments_are_judged_from_a_second_of_their_scene_on():
    judged = Judged(EvaluationConfig(since=1.0, every=2))
    moments = [(scene, begin + 0.5 * step) for scene, begin in (("a", 7.0), ("b", 100.0)) for step in range(5)]
    assert [place for place, moment in enumerate(moments) if judged(*moment)] == [2, 4, 8]


MATCHED = "model.history.intervals=0.5"
REFUSALS = {  # options, with STEP1 for a checkpoint and OTHER for a file that is none → what is said
    "missing": (
        (MATCHED, "model.weights=nowhere.pt"),
        "model.weights is nowhere.pt: no such file; train static_bev_step1",
    ),
    "no checkpoint": ((MATCHED, "model.weights=OTHER"), "model.weights: .* so it cannot be checked"),
    "another network": ((MATCHED, "model.weights=STEP1"), "is not of step 1 of this network: it .* of another shape"),
    "groups": (
        ("model.groups={'front': ('CAM_FRONT', 'CAM_TOP')}",),
        "model.groups do not fit the rig .*: the rig has no CAM_TOP; no group has CAM_FRONT_LEFT",
    ),
    "intervals": (("model.history.intervals=0.7",), "history.intervals: no moment of the split has one 0.7 s"),
    "pattern": (
        (MATCHED, "model.weights=none", "optim.freeze_until={'camera': 5}"),
        "the pattern 'camera' matches no parameter; did you mean 'cameras'",
    ),
    "width": (("data.line_width=0.6",), "data.line_width is 0.6, needs at most 0.5, two cells of the labels"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused_in_one_line(small_world, step1, name, tmp_path, monkeypatch):
    options, message = REFUSALS[name]
    other = str(Path(small_world) / "v1.0-mini" / "scene.json")
    options = [option.replace("STEP1", step1).replace("OTHER", other) for option in options]
    monkeypatch.setattr(program, "world", lambda timeout: nullcontext(World()))
    what = ["--config", "static_bev_step2_tiny", "--data", str(small_world), "--work-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=message) as error:
        program.main([*what, "--cfg-options", "data.image_size=32,64", "loader.batch_size=1", *options])
    assert "\n" not in str(error.value.code)


def test_without_a_root_it_says_how_to_make_one():
    made = experiment("static_bev_step1_tiny")
    with pytest.raises(ValueError, match="data.root is empty, static BEV needs a folder in nuScenes format"):
        made.build_data()
