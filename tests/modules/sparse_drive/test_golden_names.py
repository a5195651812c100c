"""Every parameter of the released SparseDrive models finds its place, with its shape."""

import json

import pytest
import torch

from rigfuse.modules.sparse_drive.head import as_upstream
from rigfuse.modules.sparse_drive.network import SparseDriveConfig
from rigfuse.modules.sparse_drive.upstream_names import UNUSED, convert, model_name
from support.golden import golden_sets

SETS = golden_sets("sparsedrive_names")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden list of SparseDrive's names beside the checkout")


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_every_name_finds_its_place(folder):
    entries = json.loads((folder.folder / "names.json").read_text())["entries"]
    config = SparseDriveConfig()
    as_upstream(config.head)
    with torch.device("meta"):
        model = config.build()
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    places = {name: model_name(name, config.head) for name in entries}
    assert [name for name, place in places.items() if place is None] == [f"head.{UNUSED}"]
    for name, place in places.items():
        assert place is None or ours.get(place) == entries[name]["shape"], (name, place)
    filled = {place for place in places.values() if place is not None}
    assert len(filled) == len(places) - 1 and filled == ours.keys()

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {places[name] for name, entry in entries.items() if entry["trained"]}

    tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in entries.items()}
    converted = convert(tensors, ours, lambda name: model_name(name, config.head))
    model.load_state_dict(converted, strict=True, assign=True)
    tensors["head.det_head.fc_later.weight"] = tensors.pop("head.det_head.fc_after.weight")
    with pytest.raises(ValueError, match="no place for head.det_head.fc_later.weight; nothing for head.detection.mix"):
        convert(tensors, ours, lambda name: model_name(name, config.head))
