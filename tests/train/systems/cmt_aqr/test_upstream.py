"""Every parameter of the released CMT finds its place, in the layout of the network here, from the command line on."""

import json

import pytest
import torch

from rigfuse.modules.cmt_aqr.upstream_names import ROUTING, converted
from rigfuse.modules.detection.batch import DetectionInput
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig
from rigfuse.train import checkpoint
from rigfuse.train.systems import experiment
from rigfuse.train.systems.cmt_aqr.upstream import import_whole
from rigfuse.train.tools import import_checkpoint
from support.golden import golden_sets

SETS = golden_sets("cmt_names")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden list of CMT's names beside the checkout")
UPSTREAM = "cmt_aqr_upstream_voxel0100_r50_800x320_cbgs"


@pytest.fixture(scope="module", params=SETS, ids=lambda folder: folder.name)
def entries(request):
    return json.loads((request.param.folder / "names.json").read_text())["entries"]


@pytest.fixture(scope="module")
def made(entries):
    """A state dict with upstream's names and shapes; every tensor holds one number, and costs no memory."""
    kinds = dict(float32=torch.float32, int64=torch.int64)
    values = {name: number % 97 / 97 for number, name in enumerate(entries)}
    return {n: torch.full((), values[n]).to(kinds[e["dtype"]]).expand(e["shape"]) for n, e in entries.items()}


def test_every_name_finds_its_place_and_the_network_is_full(made):
    weights = import_whole(made)
    with torch.device("meta"):
        model = experiment(UPSTREAM).build_model()
    rest = model.load_state_dict(weights, strict=False, assign=True)
    assert {name.split(".")[0] for name in rest.missing_keys} == set(ROUTING) and not rest.unexpected_keys
    for name, tensor in made.items():
        for place in converted(name, tensor, 6):
            first, found = tensor.flatten()[0], weights[place].aminmax()
            scale = 255 if place == "pts_middle_encoder.stem.conv.weight" else 1  # of one of its channels
            assert (found.min, found.max) == (first, first * scale), place


def test_the_command_makes_a_checkpoint_that_routing_is_fine_tuned_from(entries, made, tmp_path, capsys):
    torch.save({"state_dict": made, "meta": dict(epoch=20)}, tmp_path / "cmt.pth")
    import_checkpoint.main(["--from", "cmt", str(tmp_path / "cmt.pth"), "--out", str(tmp_path / "cmt")])
    told = capsys.readouterr().out
    assert "transformer: all 158 tensors filled" in told and "pts_middle_encoder: all 126 tensors filled" in told
    settings = experiment(UPSTREAM)
    with torch.device("meta"):
        model = settings.build_model()
    there = checkpoint.load(tmp_path / "cmt" / "last.pt")["model"]
    own = {n: x.shape for n, x in model.state_dict().items() if n.split(".")[0] not in ROUTING}
    assert {name: tensor.shape for name, tensor in there.items()} == own


def test_either_layout_of_a_sparse_kernel_is_read(made):
    name = "pts_middle_encoder.encoder_layers.encoder_layer1.2.0.weight"
    kernel = torch.randn(made[name].shape)  # (out, z, y, x, in)
    (new,) = converted(name, kernel, 6).values()
    (old,) = converted(name, kernel.movedim(0, -1), 6).values()
    assert torch.equal(new, old) and torch.equal(new[9 + 3 + 2], kernel[:, 1, 1, 2].T)


def test_what_does_not_fit_is_listed_by_name(made):
    state = {name: tensor for name, tensor in made.items() if name != "pts_neck.deblocks.1.1.bias"}
    state["img_neck.fpn_convs.0.conv.bias"] = torch.ones(7)
    for name in ("pts_bbox_head.gate.weight", "pts_backbone.blocks.x", "img_backbone.layer5.0.conv1.weight"):
        state[name] = torch.ones(1)
    with pytest.raises(ValueError) as raised:
        import_whole(state)
    for told in (
        "no place for pts_bbox_head.gate.weight, pts_backbone.blocks.x;",
        "the network here has no img_backbone.body.encoder.stages.4.",
        "nothing for pts_neck.blocks.1.1.bias;",
        "img_neck.smooth.0.bias is (7,), needs (256,)",
    ):
        assert told in str(raised.value)


def test_a_network_of_full_size_runs_on_imported_weights(made):
    """Of the released parameters all; of pixels and cells few."""
    state = {}  # every layer gives about what it got
    for name, tensor in made.items():
        fan = max(tensor.shape[1:].numel(), 1) if tensor.ndim > 1 else 1
        state[name] = torch.full(tensor.shape, 1.0 / fan)
    settings = experiment(UPSTREAM)
    settings.model.lidar.grid, settings.data.image_size = (41, 64, 64), (32, 64)
    with torch.device("meta"):
        model = settings.build_model()
    weights = import_whole(state)
    aqr = {n: torch.zeros(x.shape) for n, x in model.state_dict().items() if n.split(".")[0] in ROUTING}
    aqr["attention_bias_generator.bias_scale"] += 2.5
    model.load_state_dict(weights | aqr, assign=True)
    points = torch.cat([torch.rand(500, 3) * 6 - torch.tensor([54.0, 54.0, 5.0]), torch.rand(500, 2)], dim=1)
    image_T_ego = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.04, crop=(0, 4, 64, 32))).image_T_ego[None]
    batch = DetectionInput(torch.randn(1, 6, 3, 32, 64), image_T_ego, [points], [torch.empty(0, 9)], [], ["a"])
    with torch.no_grad():
        output = model.eval()(batch)
    assert output.predictions.boxes.shape == (6, 1, 900, 10) and output.predictions.boxes.isfinite().all()
