"""The figures of the analysis are those that one finds by hand, on a tiny detector whose weights say something."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rigfuse.modules.detection.boxes import DETECTION_CLASSES
from rigfuse.train import checkpoint
from rigfuse.train.config import to_dict
from rigfuse.train.data.images import normalised
from rigfuse.train.systems import experiment
from rigfuse.train.systems.cmt_aqr import routing
from rigfuse.train.tools import analyze_aqr_weights as tool

TINY = "cmt_aqr_voxel0100_r50_800x320_cbgs_tiny"
SCORE = 0.8


def save(folder, settings, weights):
    state = dict(model=weights, config=to_dict(settings), counters=dict(step=7))
    return checkpoint.save(folder / "checkpoints", 7, state, keep=1)


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory):
    """A run whose queries stand 3, 8, 13 … m from the ego, with AQR and class heads that differ between them."""
    torch.manual_seed(0)
    settings = experiment(TINY)
    settings.model.queries, settings.data.root = 40, str(small_world)
    model = settings.build_model().eval()
    for layer in (model.aqr_weight_generator.value, model.aqr_weight_generator.out, model.aqr_weight_generator.last):
        nn.init.normal_(layer.weight, std=0.6)
    model.shared_conv[
        1
    ].weight.data *= 3000  # or what an untrained network makes of the points would be next to nothing
    metres = torch.tensor([3.0 + 5 * (index % 10) for index in range(40)]).clamp(max=25 * 2**0.5)
    place = torch.stack([metres / 2**0.5, metres / 2**0.5, torch.zeros(40)], dim=1)
    low, high = torch.tensor(settings.data.point_range).view(2, 3)
    model.reference_points.data = (place - low) / (high - low)
    model.attention_bias_generator.bias_scale.data.fill_(2.75)
    classes, batch = model.task_heads.tasks["logits"], settings.collate([settings.build_data()[1][0, 0]])
    with torch.no_grad():
        logits = model(batch.to("cpu")).predictions.logits[-1, 0]
        classes.weight_out[-1] /= logits.std(0)  # so that queries differ
        classes.bias_out[-1] = (classes.bias_out[-1] - logits.mean(0)) / logits.std(0)
    folder = tmp_path_factory.mktemp("runs") / "run"
    save(folder, settings, model.state_dict())
    lines = [dict(step=1, loss=3.0), {"step": 2, "aqr/bias_scale": 2.5}, {"step": 7, "aqr/bias_scale": 2.75}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def analysed(run, small_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("analyses") / "deep" / "out"
    arguments = [str(run), "--data", str(small_world), "--out", str(out), "--samples", "2", "--score", str(SCORE)]
    assert tool.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def by_hand(run, small_world):
    """Input → (camera, LiDAR, metres, class) of each query of the first two samples, one by one."""
    settings = experiment(TINY)
    settings.model.queries, settings.data.root = 40, str(small_world)
    model = settings.build_model().eval()
    model.load_state_dict(checkpoint.load(run / "checkpoints" / "last.pt")["model"])
    validation = settings.build_data()[1]
    found = {"camera + LiDAR": [], "no image": [], "no LiDAR": []}
    for index in range(2):
        classes = None
        for name, rows in found.items():
            batch = settings.collate([validation[0, index]]).to("cpu")
            if name == "no image":
                batch.images = normalised(torch.zeros_like(batch.images, dtype=torch.uint8))
            if name == "no LiDAR":
                batch.points = [torch.empty(0, 5)]
            with torch.no_grad():
                output = model(batch)
            if classes is None:
                scores = output.predictions.logits[-1, 0].sigmoid().tolist()
                classes = [
                    DETECTION_CLASSES[own.index(max(own))] if max(own) >= SCORE else "background" for own in scores
                ]
            for query, (camera, lidar) in enumerate(output.weights[0].tolist()):
                x, y, _ = output.reference[0, query].tolist()
                rows.append((camera, lidar, math.hypot(x, y), classes[query]))
    return found


def quantile(values, share):
    values, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def chosen(rows, group):
    if group == "all":
        return [True] * len(rows)
    if group.endswith(" m"):
        low, _, high = group.removesuffix(" m").removesuffix("+").partition("–")
        return [float(low) <= row[2] < float(high or "inf") for row in rows]
    return [row[3] == group for row in rows]


def test_every_figure_is_that_found_by_hand(analysed, by_hand):
    report = json.loads((analysed / "weights.json").read_text())
    assert (report["samples"], report["generation"], report["score"]) == (2, "v3", SCORE)
    counts = {}
    for row in report["figures"]:
        column, rows = ("camera", "lidar").index(row["modality"]), by_hand[row["input"]]
        members = chosen(by_hand["camera + LiDAR"], row["group"])
        values = [own[column] for own, member in zip(rows, members) if member]
        both = [own[column] for own, member in zip(by_hand["camera + LiDAR"], members) if member]
        assert row["count"] == len(values)
        counts[row["group"]] = len(values)
        if not values:
            assert set(row) == {"input", "group", "modality", "count"}
            continue
        mean = sum(values) / len(values)
        expected = dict(
            mean=mean,
            std=math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)),
            **{f"q{percent}": quantile(values, percent / 100) for percent in (5, 25, 50, 75, 95)},
            negative=sum(value < 0 for value in values) / len(values),
            saturated=sum(abs(value) > 0.95 for value in values) / len(values),
            change=sum(abs(a - b) for a, b in zip(values, both)) / len(values),
        )
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert [counts[name] for name in routing.BINS] == [16, 16, 16, 32, 0]
    assert counts["all"] == 80 and sum(counts[name] > 0 for name in routing.CLASSES) >= 2


def test_the_routing_is_seen_to_react(analysed):
    rows = json.loads((analysed / "weights.json").read_text())["figures"]
    found = {(row["input"], row["modality"]): row for row in rows if row["group"] == "all"}
    assert len(rows) == 3 * 2 * (1 + 5 + 11) and 0 < found["camera + LiDAR", "camera"]["saturated"] < 1
    assert found["camera + LiDAR", "camera"]["change"] == 0
    assert found["no image", "camera"]["change"] > 1e-3 and found["no LiDAR", "lidar"]["change"] > 1e-3


def test_the_report_has_the_scale_the_tables_and_the_pictures(analysed, by_hand):
    text = (analysed / "report.md").read_text()
    assert "2.7500, used within [0.5, 5.0]. Logged: 2.5000 at step 2, 2.7500 at step 7" in text
    values = [row[1] for row in by_hand["no LiDAR"]]
    assert f"| all | lidar | 80 | {sum(values) / 80:+.3f} |" in text.split("## no LiDAR")[1]
    assert "40+ m" not in text  # where no query is, there is no row
    names = {"histogram.png", "means.png", "bias_scale.png"}
    assert {path.name for path in analysed.iterdir()} == names | {"report.md", "weights.json"}
    assert [path.name for path in analysed.parent.iterdir()] == ["out"]
    for name in names:
        assert f"({name})" in text
        with Image.open(analysed / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_bins_begin_where_they_say_and_classes_end_with_background():
    distance = np.array([0, 9.99, 10, 39.99, 40, 1e4])
    routed = routing.Routed({}, distance, np.array([0, 9, 10, 10, 0, 1]))
    groups = {name: members.nonzero()[0].tolist() for name, members in routed.groups().items() if members.any()}
    assert groups.pop("all") == list(range(6))
    assert groups == {"0–10 m": [0, 1], "10–20 m": [2], "30–40 m": [3], "40+ m": [4, 5]} | {
        "car": [0, 4],
        "traffic_cone": [1],
        "background": [2, 3],
        "truck": [5],
    }


def test_statistics_of_known_weights():
    found = routing.statistics(np.array([-1.0, -0.95, 0.0, 0.95, 1.0]))
    assert found["negative"] == found["saturated"] == 0.4 and found["mean"] == found["q50"] == 0.0
    assert found["q25"] == -0.95 and found["count"] == 5 and routing.statistics(np.zeros(0)) == dict(count=0)


def fails(capsys, *arguments):
    assert tool.main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", [TINY.replace("cmt_aqr", "cmt"), "completion_v1_tiny"])
def test_a_checkpoint_without_aqr_is_refused(name, tmp_path, capsys):
    path = save(tmp_path / "run", experiment(name), {})
    error = fails(capsys, tmp_path / "run", "--data", "nowhere", "--out", tmp_path / "out")
    assert f"{path.with_name('last.pt')} is of {name}, which has no AQR" in error


def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "gone/checkpoints/last.pt does not exist" in fails(
        capsys, "gone/checkpoints/last.pt", "--data", "x", "--out", out
    )
    assert "nowhere" in fails(capsys, run, "--data", "nowhere", "--out", out)
    for arguments, said in (
        (["--samples", "0"], "--samples is 0, needs at least 1"),
        (["--score", "2"], "--score is 2, needs above 0 and at most 1"),
        (["--sample", "3"], "did you mean '--samples'?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tool.main([str(run), "--data", "x", "--out", str(out), *arguments])
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(run), "--data", "x", "--out", str(out)])
    assert "exists already" in capsys.readouterr().err
