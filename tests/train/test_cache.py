"""The cache of ground truth: what goes in comes out, for this key only, whole or not at all."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rigfuse.train.data import cache, driving_truth, open_drives
from rigfuse.train.data.cache import open_cache, tables_digest, write_cache
from rigfuse.train.data.driving_truth import DrivingTruth, TruthConfig, truth_cache
from rigfuse.train.data.map_truth import VectorMap, scene_locations
from rigfuse.train.data.nuscenes import open_nuscenes

KEY = {"settings": {"size": [60.0, 30.0]}, "tables": "0123"}


def content(number=5):
    rng = np.random.default_rng(0)
    for index in range(number):
        lines = rng.normal(0, 1, (index % 3, 2))
        yield f"t{index}", {"points": lines, "labels": np.arange(index % 3), "path": rng.normal(0, 1, (6, 2)) > 0}


def test_what_goes_in_comes_out(tmp_path):
    index = write_cache(tmp_path, "val", KEY, content())
    opened = open_cache(tmp_path, "val", KEY)
    assert list(opened) == [f"t{i}" for i in range(5)] and len(opened) == 5
    for token, arrays in content():
        assert opened[token].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(opened[token][name], array)
            assert opened[token][name].dtype == array.dtype and opened[token][name].shape == array.shape
    with pytest.raises(ValueError, match="read-only"):
        opened["t1"]["points"][:] = 0
    with pytest.raises(KeyError):
        opened["t9"]
    with np.load(index.with_suffix(".npz"), allow_pickle=False) as file:
        assert not any(file[name].dtype.hasobject for name in file.files)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first, second = (write_cache(tmp_path / name, "val", KEY, content()) for name in "ab")
    for suffix in (".json", ".npz"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_another_key_or_split_is_another_cache(tmp_path):
    write_cache(tmp_path, "val", KEY, content())
    write_cache(tmp_path, "val", KEY | {"tables": "4567"}, content(2))
    assert len(open_cache(tmp_path, "val", KEY)) == 5
    for split, key in (("train", KEY), ("val", {"settings": {"size": [100.0, 50.0]}, "tables": "0123"})):
        with pytest.raises(FileNotFoundError, match=f"no cache of split '{split}' for these settings and tables"):
            open_cache(tmp_path, split, key)


@pytest.mark.parametrize("damage", ["a bit", "cut", "no index", "bad index", "another file"])
def test_damage_is_refused(tmp_path, damage):
    index = write_cache(tmp_path, "val", KEY, content())
    data = index.with_suffix(".npz")
    whole = bytearray(data.read_bytes())
    if damage == "a bit":
        whole[len(whole) // 2] ^= 1
        data.write_bytes(whole)
    elif damage == "cut":
        data.write_bytes(whole[:-100])
    elif damage == "another file":
        data.write_bytes(write_cache(tmp_path, "other", KEY, content(2)).with_suffix(".npz").read_bytes())
    elif damage == "bad index":
        index.write_text("{}")
    else:
        index.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged .* delete it|no cache of split"):
        open_cache(tmp_path, "val", KEY)


def test_a_crash_leaves_the_old_state(tmp_path, monkeypatch):
    write_cache(tmp_path, "val", KEY, content())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache.np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        write_cache(tmp_path, "val", KEY, content(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "samples, message",
    [
        ([], "split 'val' has 0 samples"),
        ([("a", {"x": np.zeros(2)})] * 2, "has 2 samples, 1 of them different"),
        ([("a", {"x": np.zeros(2)}), ("b", {"y": np.zeros(2)})], r"sample b has \['y'\], the others have \['x'\]"),
        ([("a", {"x": np.zeros(2)}), ("b", {"x": np.zeros((2, 2))})], "arrays 'x' differ in type or shape"),
        ([("a", {"x": np.zeros(2)}), ("b", {"x": np.zeros(2, int)})], "arrays 'x' differ in type or shape"),
        ([("a", {"x": np.array(1.0)})], "arrays 'x' .* no arrays of numbers"),
        ([("a", {"x": np.array([None])})], "arrays 'x' .* no arrays of numbers"),
    ],
)
def test_content_that_does_not_fit_is_refused(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_cache(tmp_path, "val", KEY, samples)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_follows_tables_and_maps(tmp_path):
    for name in ("v1.0-mini/sample_data.json", "v1.0-mini/scene.json", "maps/expansion/a.json", "can_bus/b.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    digests = [tables_digest(tmp_path), tables_digest(tmp_path, "v1.0-mini")]
    assert digests[0] == digests[1]
    for name in ("can_bus/b.json", "v1.0-mini/scene.json", "maps/expansion/a.json"):
        (tmp_path / name).write_text("[1]")
        digests.append(tables_digest(tmp_path))
    assert digests[2] == digests[0] and len(set(digests)) == 3


def test_the_truth_of_a_split(small_world, tmp_path, monkeypatch):
    made = truth_cache(tmp_path, small_world, None, "world_val")
    assert len(list(tmp_path.glob("world_val-*"))) == 2
    monkeypatch.setattr(driving_truth, "write_cache", lambda *arguments: pytest.fail("made again"))
    opened = truth_cache(tmp_path, small_world, None, "world_val")
    (drive,) = open_drives(small_world, split="world_val")
    vector_map = VectorMap.load(small_world, scene_locations(open_nuscenes(small_world))[drive.name])
    moments = list(drive)
    assert list(opened) == [moment.token for moment in moments]
    for index, moment in enumerate(moments):
        truth = driving_truth.driving_truth(moments, index, vector_map, TruthConfig())
        for kept in (made, opened):
            back = DrivingTruth.from_arrays(kept[moment.token])
            assert json.dumps(plain(back)) == json.dumps(plain(truth))
        assert truth.agent_paths.shape == (len(moment.boxes), 12, 2) and len(truth.map.lines) > 0
    with pytest.raises(pytest.fail.Exception):
        truth_cache(tmp_path, small_world, None, "world_val", replace(TruthConfig(), ego_steps=4))


def plain(truth):
    return {name: array.tolist() for name, array in truth.arrays().items()}
