"""Released weights of SparseDrive, whole, through the command, by upstream's list of names."""

import json

import pytest
import torch

from rigfuse.train import checkpoint
from rigfuse.train.tools import import_checkpoint
from support.golden import golden_sets

SETS = golden_sets("sparsedrive_names")


@pytest.fixture(scope="module")
def state():
    if not SETS:
        pytest.skip("no golden list of SparseDrive's names beside the checkout")
    entries = json.loads((SETS[0].folder / "names.json").read_text())["entries"]
    return {name: torch.zeros(()).expand(entry["shape"]) for name, entry in entries.items()}


def run(tmp_path, state, *options):
    torch.save(dict(state_dict=state), tmp_path / "released.pth")
    where = ["--out", str(tmp_path / "out"), *options]
    return import_checkpoint.main(["--from", "sparsedrive", str(tmp_path / "released.pth"), *where])


def test_the_whole_model_becomes_a_checkpoint(state, tmp_path, capsys, monkeypatch):
    kept = {}
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, content, keep: kept.update(content))  # 350 MB else
    assert run(tmp_path, state, "--whole") == 0
    parts = {name.split(".")[0] for name in kept["model"]}
    assert parts == {"backbone", "head", "depth"} and len(kept["model"]) == len(state) - 1
    assert "tensors of the driving model filled; its frame is the LiDAR's" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(state, tmp_path, capsys):
    short = {name: tensor for name, tensor in state.items() if name != "depth_branch.depth_layers.0.weight"}
    with pytest.raises(SystemExit):
        run(tmp_path, short, "--whole")
    assert "nothing for depth.layers.0.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        import_checkpoint.main(["--from", "torchvision", "x.pth", "--out", str(tmp_path / "out"), "--whole"])
    assert "--whole needs --from sparsedrive" in capsys.readouterr().err
