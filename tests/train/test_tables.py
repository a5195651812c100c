"""Wrong tables are refused in one line that names table, token and field; the rest of a root stays readable."""

import json
import os

import numpy as np
import pytest

from rigfuse.train.data import open_drives
from rigfuse.train.data.tables import read_tables
from support.patience import within
from support.roots import VERSION, copy_root, edit, read_table

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def root(small_world, tmp_path):
    return copy_root(small_world, tmp_path / "root")


def opened(root):
    """Every moment of a root, its scans found; returns how many."""
    moments = [moment for drive in open_drives(root) for moment in drive]
    for moment in moments:
        assert moment.world_T_ego.isfinite().all() and moment.rig.image_T_ego.isfinite().all()
        assert len(moment.ego_boxes) == len(moment.boxes) and len(moment.sweeps(4)) <= 4
    return len(moments)


def refusal(root):
    with pytest.raises(ValueError) as caught:
        opened(root)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def pose(field, value):
    return [(table, field, value) for table in ("ego_pose", "calibrated_sensor", "sample_annotation")]


DAMAGES = [
    *pose("translation", [1.0, NAN, 0.0]),
    *pose("translation", [1.0, 2.0]),
    *pose("translation", [1e30, 0, 0]),
    *pose("translation", ["1", "2", "3"]),
    *pose("rotation", [0.0, 0.0, 0.0, 0.0]),
    *pose("rotation", [0.5, 0.0, 0.0, 0.0]),
    *pose("rotation", [INF, 0.0, 0.0, 0.0]),
    *pose("rotation", [1.0, 0.0, 0.0, None]),
    ("calibrated_sensor", "camera_intrinsic", []),
    ("calibrated_sensor", "camera_intrinsic", [[500, 0, 300], [0, 0, 200], [0, 0, 1]]),
    ("calibrated_sensor", "camera_intrinsic", [[500, 500, 300], [500, 500, 200], [0, 0, 1]]),
    ("calibrated_sensor", "camera_intrinsic", [[500, 0, NAN], [0, 500, 200], [0, 0, 1]]),
    ("calibrated_sensor", "camera_intrinsic", [[-500, 0, 300], [0, 500, 200], [0, 0, 1]]),
    ("calibrated_sensor", "camera_intrinsic", [[500, 0, 300], [0, 500, 200], [0, 0, 2]]),
    ("calibrated_sensor", "sensor_token", "nobody"),
    ("sample_data", "width", 0),
    ("sample_data", "height", -36),
    ("sample_data", "width", 64.0),
    ("sample_data", "width", 10**30),
    ("sample_data", "is_key_frame", 1),
    ("sample_data", "timestamp", "yesterday"),
    ("sample_data", "timestamp", 0),
    ("sample_data", "filename", "../outside.jpg"),
    ("sample_data", "filename", "samples/../../outside.jpg"),
    ("sample_data", "filename", "/etc/hostname"),
    ("sample_data", "filename", "samples/\0.jpg"),
    ("sample_data", "filename", "samples/\ud800.jpg"),
    ("sample_data", "filename", "x" * 300),
    ("sample_data", "filename", None),
    ("sample_data", "ego_pose_token", "nobody"),
    ("sample_data", "sample_token", ["a", "list"]),
    ("sample_data", "prev", "nobody"),
    ("sample", "timestamp", NAN),
    ("sample", "scene_token", "nobody"),
    ("sample", "next", "nobody"),
    ("scene", "log_token", ""),
    ("scene", "first_sample_token", "nobody"),
    ("scene", "name", "../outside"),
    ("scene", "name", ""),
    ("log", "location", "../../../outside"),
    ("log", "location", "a/b"),
    ("map", "filename", "../../mask.png"),
    ("map", "log_tokens", [{}]),
    ("map", "log_tokens", {}),
    ("sensor", "modality", "camfra"),
    ("sensor", "channel", 3),
    ("category", "name", None),
    ("instance", "category_token", "nobody"),
    ("instance", "last_annotation_token", "nobody"),
    ("sample_annotation", "instance_token", "nobody"),
    ("sample_annotation", "sample_token", "nobody"),
    ("sample_annotation", "attribute_tokens", "nobody"),
    ("sample_annotation", "attribute_tokens", ["nobody"]),
    ("sample_annotation", "size", [0.0, 1.0, 1.0]),
    ("sample_annotation", "num_lidar_pts", -1),
    ("sample_annotation", "num_radar_pts", None),
]


@pytest.mark.parametrize("table, field, value", DAMAGES, ids=lambda part: str(part)[:30])
def test_a_wrong_value_is_refused_by_name(root, table, field, value):
    token = read_table(root, table)[0]["token"]
    edit(root, table, lambda rows: rows[0].update({field: value}))
    assert f"{VERSION}: {table} {token}: {field} is " in refusal(root)


@pytest.mark.parametrize(
    "table, field",
    [("sample", "next"), ("sample_data", "filename"), ("sample_annotation", "size"), ("ego_pose", "rotation")],
)
def test_a_field_that_is_absent_is_named(root, table, field):
    token = read_table(root, table)[1]["token"]
    edit(root, table, lambda rows: rows[1].pop(field) and None)
    assert refusal(root).endswith(f"{table} {token} has no field '{field}'")


def chained(root, table):
    """(first, second) rows of a chain."""
    rows = read_table(root, table)
    first = next(row for row in rows if not row["prev"] and row["next"])
    return first, next(row for row in rows if row["token"] == first["next"])


def set_field(root, table, token, **fields):
    edit(root, table, lambda rows: next(row for row in rows if row["token"] == token).update(fields))


@pytest.mark.parametrize("table", ["sample", "sample_data", "sample_annotation"])
@pytest.mark.parametrize("ring", ["self", "pair", "cut", "crossed"])
def test_chains_cannot_go_round_or_be_cut(root, table, ring):
    first, second = chained(root, table)
    if ring == "self":
        set_field(root, table, first["token"], next=first["token"], prev=first["token"])
    elif ring == "pair":
        set_field(root, table, second["token"], next=first["token"])
        set_field(root, table, first["token"], prev=second["token"])
    elif ring == "cut":
        set_field(root, table, first["token"], next="")
    else:
        owner = {"sample": "scene_token", "sample_data": "calibrated_sensor_token"}.get(table, "instance_token")
        stranger = next(row for row in read_table(root, table) if row[owner] != first[owner] and not row["prev"])
        set_field(root, table, first["token"], next=stranger["token"])
        set_field(root, table, stranger["token"], prev=first["token"])
        set_field(root, table, second["token"], prev="")
    message = refusal(root)
    assert f": {table} " in message and (": next is " in message or ": prev is " in message)


def test_a_scene_is_one_chain_in_time(root):
    """Links that answer each other, but go round beside the scene, or stop before its end, or run backwards."""
    first, second = chained(root, "sample")
    third = next(row for row in read_table(root, "sample") if row["token"] == second["next"])
    one, two, three = first["token"], second["token"], third["token"]
    scene = first["scene_token"]

    def linked(last, *links):
        for token, (before, after) in zip((one, two, three), links):
            set_field(root, "sample", token, prev=before, next=after)
        set_field(root, "scene", scene, last_sample_token=last)
        return refusal(root)

    assert f"sample {three}: next is '{two}', needs a row of a later time" in linked(
        one, ("", ""), (three, three), (two, two)
    )
    assert f"sample {two}: prev is '', needs a sample, or to be the scene's" in linked(
        three, ("", ""), ("", three), (two, "")
    )
    chain = ("", two), (one, three), (two, "")
    assert f"scene {scene}: last_sample_token is '{two}', needs a sample without next" in linked(two, *chain)
    stranger = next(row for row in read_table(root, "scene") if row["token"] != scene)["last_sample_token"]
    set_field(root, "scene", scene, last_sample_token=stranger)
    assert f"scene {scene}: last_sample_token is '{stranger}', needs a sample of this scene" in refusal(root)
    set_field(root, "scene", scene, last_sample_token=three)
    set_field(root, "sample", two, timestamp=third["timestamp"])
    assert f"sample {two}: next is '{three}', needs a row of a later time" in refusal(root)
    set_field(root, "sample", two, timestamp=second["timestamp"])
    assert opened(root) == 6


def test_every_log_has_a_map(root):
    edit(root, "map", lambda rows: rows[0].update(log_tokens=rows[0]["log_tokens"][1:]))
    assert ": log " in refusal(root) and "needs a row of map whose log_tokens have it" in refusal(root)
    edit(root, "map", lambda rows: [])
    assert "needs a row of map" in refusal(root)


def test_what_must_be_there_once(root):
    edit(root, "sample", lambda rows: rows.append(dict(rows[0])))
    assert "needs one row of its own" in refusal(root)
    edit(root, "sample", lambda rows: rows[:-1])
    edit(root, "scene", lambda rows: rows[1].update(name=rows[0]["name"]))
    assert f"name is '{read_table(root, 'scene')[0]['name']}', needs a name that no other scene has" in refusal(root)
    edit(root, "scene", lambda rows: rows[1].update(name="other"))
    assert opened(root) == 6
    sample = read_table(root, "sample")[0]["token"]
    twice = next(
        row for row in read_table(root, "sample_data") if row["sample_token"] == sample and row["is_key_frame"]
    )
    edit(root, "sample_data", lambda rows: rows.append({**twice, "token": "twice", "prev": "", "next": ""}))
    assert "sample_data twice: sample_token is " in refusal(root)
    edit(root, "sample_data", lambda rows: [r for r in rows if r["sample_token"] != sample and not r["prev"]])
    edit(root, "sample_data", lambda rows: [row.update(prev="", next="") for row in rows] and None)
    assert ": sample " in refusal(root) and "key frame" in refusal(root)


def test_files_that_are_no_tables(root):
    folder = root / VERSION
    whole = (folder / "sample.json").read_bytes()
    for content in (b"", b"{}", b"[1, 2]", b"[[]]", b"null", whole[:-30], b"\xff\xfe[]", b"[" * 100_000, whole + b"x"):
        (folder / "sample.json").write_bytes(content)
        assert "sample.json" in refusal(root), content[:20]
    (folder / "sample.json").unlink()
    assert refusal(root) == f"{folder / 'sample.json'} is missing"
    os.mkfifo(folder / "sample.json")  # reading it would wait for ever
    with within(20):
        assert refusal(root) == f"{folder / 'sample.json'} is missing"


def test_flipped_bits_are_seen_or_harmless(root):
    """Every bit of the tables but those of values that may be anything plausible."""
    rng = np.random.default_rng(0)
    seen = 0
    for file in sorted((root / VERSION).glob("*.json")):
        whole = file.read_bytes()
        for place in rng.integers(len(whole), size=25):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                assert opened(root) == 6
            except ValueError as error:
                assert "\n" not in str(error) and str(root) in str(error)
                seen += 1
        file.write_bytes(whole)
    assert seen > 150 and opened(root) == 6


def test_real_tables_are_right(nuscenes_root, ddad_root):
    tables = read_tables(nuscenes_root / VERSION)
    assert len(tables) == 13 and len(tables["sample_annotation"]) == 18_538
    assert json.dumps(read_tables(ddad_root / VERSION)["sample"]) == json.dumps(read_table(ddad_root, "sample"))
