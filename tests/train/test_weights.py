"""Weights of others: by made state dicts with the names of torchvision, mmdetection, transformers and SparseDrive."""

import json
import re

import pytest
import torch

from rigfuse.modules.backbones import BackboneConfig, PyramidConfig, ResNet, ResNetFPN
from rigfuse.train import checkpoint
from rigfuse.train.tools import import_checkpoint
from rigfuse.train.weights import import_backbone, read_tensors
from support.golden import golden_sets

STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def ours():
    """The names of the network here → a tensor of that shape that holds one number, another for each name."""
    with torch.device("meta"):
        names = ResNetFPN(PyramidConfig(strides=STRIDES), 256).state_dict()
    made = {}
    for number, (name, tensor) in enumerate(names.items(), 1):
        made[name] = torch.full((), number, dtype=tensor.dtype).expand(tensor.shape)
    return made


def torchvision_name(name):
    """Written the other way round: from the names here to theirs."""
    name = name.replace("body.embedder.embedder.convolution", "conv1")
    name = name.replace("body.embedder.embedder.normalization", "bn1")
    name = re.sub(r"body\.encoder\.stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", name)
    name = re.sub(r"layers\.(\d)\.layer\.(\d)\.convolution", lambda m: f"{m[1]}.conv{int(m[2]) + 1}", name)
    name = re.sub(r"layers\.(\d)\.layer\.(\d)\.normalization", lambda m: f"{m[1]}.bn{int(m[2]) + 1}", name)
    name = re.sub(r"layers\.(\d)\.shortcut\.convolution", r"\1.downsample.0", name)
    return re.sub(r"layers\.(\d)\.shortcut\.normalization", r"\1.downsample.1", name)


def mmdetection_pyramid(name):
    name = re.sub(r"fpn\.lateral\.(\d)", r"lateral_convs.\1.conv", name)
    return re.sub(r"fpn\.smooth\.(\d)", r"fpn_convs.\1.conv", name)


def theirs(ours, source):
    """The same tensors as a source has them, with something of a head."""
    state = {}
    for name, tensor in ours.items():
        body = name.startswith("body")
        if source == "torchvision" and body:
            state[torchvision_name(name)] = tensor
        elif source == "torchvision with a pyramid":
            if body and "num_batches" not in name:
                state[f"backbone.body.{torchvision_name(name)}"] = tensor
            elif not body:
                other = name.replace("fpn.lateral", "inner_blocks").replace("fpn.smooth", "layer_blocks")
                state["backbone.fpn." + re.sub(r"(\d)\.", r"\1.0.", other)] = tensor
        elif source in ("mmdetection", "sparsedrive"):
            backbone, neck = ("backbone", "neck") if source == "mmdetection" else ("img_backbone", "img_neck")
            state[f"{backbone}.{torchvision_name(name)}" if body else f"{neck}.{mmdetection_pyramid(name)}"] = tensor
        elif source == "transformers" and body:
            state["resnet." + name.removeprefix("body.")] = tensor
    head = dict(torchvision="fc.weight", transformers="classifier.1.weight").get(source, "head.fc.weight")
    return state | {head: torch.zeros(3)}


KINDS = ("torchvision", "torchvision with a pyramid", "mmdetection", "transformers", "sparsedrive")


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_comes_to_its_place(ours, kind):
    imported = import_backbone(theirs(ours, kind), kind.split()[0])
    pyramid = kind not in ("torchvision", "transformers")
    expected = {f"backbone.{name}": x for name, x in ours.items() if pyramid or name.startswith("body")}
    assert imported.weights.keys() == expected.keys() and len(imported.left_behind) == 1
    counts = kind == "torchvision with a pyramid"  # which has none
    for name, tensor in expected.items():
        same = torch.equal(imported.weights[name], tensor)
        assert same or (counts and name.endswith("num_batches_tracked")), name
    assert imported.channels == (256 if pyramid else None) and imported.strides == STRIDES
    assert any("stays random" in line for line in imported.report()) != pyramid


def test_levels_beyond_the_resnet_are_further_convolutions(ours):
    """As mmdetection lists them: after those that smooth."""
    state = {n: x for n, x in theirs(ours, "mmdetection").items() if "neck" not in n}
    for level, width in enumerate((512, 1024, 2048)):
        state[f"neck.lateral_convs.{level}.conv.weight"] = torch.zeros(64, width, 1, 1)
        state[f"neck.lateral_convs.{level}.conv.bias"] = torch.zeros(64)
    for level in range(4):
        state[f"neck.fpn_convs.{level}.conv.weight"] = torch.full((64, 64, 3, 3), float(level))
        state[f"neck.fpn_convs.{level}.conv.bias"] = torch.zeros(64)
    imported = import_backbone(state, "mmdetection")
    assert imported.strides == (8, 16, 32, 64) and imported.channels == 64
    assert imported.weights["backbone.fpn.extra.0.weight"].unique().tolist() == [3.0]


def test_what_does_not_fit_is_listed_by_name(ours):
    def without(name):
        return {n: x for n, x in theirs(ours, "sparsedrive").items() if n != name}

    for state, message in [
        (
            without("img_backbone.layer2.1.bn2.running_var"),
            "nothing for backbone.body.encoder.stages.1.layers.1.layer.1",
        ),
        (without("img_neck.fpn_convs.3.conv.bias"), "nothing for backbone.fpn.smooth.3.bias"),
        (theirs(ours, "sparsedrive") | {"img_neck.gate.weight": torch.ones(1)}, "no place for img_neck.gate.weight"),
        (
            theirs(ours, "sparsedrive") | {"img_backbone.layer5.0.conv1.weight": torch.ones(1)},
            "the network here has no ",
        ),
        (
            theirs(ours, "sparsedrive") | {"img_backbone.conv1.weight": torch.ones(64, 1, 7, 7)},
            r"is \(64, 1, 7, 7\), needs",
        ),
        (theirs(ours, "torchvision"), "no ResNet with the names of sparsedrive"),
    ]:
        with pytest.raises(ValueError, match=message):
            import_backbone(state, "sparsedrive")


def test_files_are_read_as_tensors_alone(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(dict(state_dict={"module.a": torch.ones(2)}, meta=dict(epoch=3)), tmp_path / "good.pth")
    assert list(read_tensors(tmp_path / "good.pth")) == ["a"]
    torch.save(dict(a=torch.ones(2), b=Code()), tmp_path / "bad.pth")
    torch.save(dict(a=torch.ones(2), meta=dict(config="style='caffe'")), tmp_path / "caffe.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in dict(
        bad="cannot be read", text="cannot be read", list="no tensors", caffe="caffe style"
    ).items():
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="not a file"):
        read_tensors(tmp_path / "nothing.pth")
    assert not (tmp_path / "ran").exists()


# ---- from the command line to a network


@pytest.fixture(scope="module")
def files(ours, tmp_path_factory):
    """Checkpoints that the command made, and the files it read."""
    folder = tmp_path_factory.mktemp("weights")
    for source in ("torchvision", "sparsedrive"):
        torch.save(theirs(ours, source), folder / f"{source}.pth")
        import_checkpoint.main(["--from", source, str(folder / f"{source}.pth"), "--out", str(folder / source)])
    return folder


def test_a_network_takes_what_the_command_made(ours, files):
    config = PyramidConfig(weights=str(files / "sparsedrive" / "last.pt"), strides=STRIDES)
    backbone = ResNetFPN(config, 256)
    assert all(torch.equal(value, ours[name]) for name, value in backbone.state_dict().items())
    assert backbone.random_parts() == []
    assert ResNet(BackboneConfig(weights=config.weights), (16, 32)).random_parts() == []
    assert checkpoint.load(config.weights)["config"]["name"] == "imported-sparsedrive"


def test_a_pyramid_without_weights_is_told_to_be_random(files):
    config = PyramidConfig(weights=str(files / "torchvision" / "last.pt"))
    assert ResNetFPN(config, 256).random_parts() == ["FPN"]
    assert ResNetFPN(PyramidConfig(resnet="tiny"), 16).random_parts() == ["ResNet", "FPN"]


def test_weights_that_leave_something_unfilled_are_refused(files):
    for weights, settings, message in [
        (files / "torchvision.pth", {}, "names of torchvision or mmdetection; train/tools/import_checkpoint.py"),
        (files / "sparsedrive" / "last.pt", {}, "lacks 2 of 14 weights of the backbone's fpn .extra.0.weight"),
        (files / "torchvision" / "last.pt", dict(resnet="tiny"), "of another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            ResNetFPN(PyramidConfig(weights=str(weights), **settings), 256)


def test_a_folder_with_torchvisions_names_is_refused(files, tmp_path, capfd):
    """transformers loads such a folder, and leaves the network random."""
    from safetensors.torch import save_file
    from transformers import ResNetBackbone, ResNetConfig

    small = dict(embedding_size=16, hidden_sizes=(16, 32, 64, 128), depths=(1, 1, 1, 1), layer_type="basic")
    network = ResNetBackbone(ResNetConfig(**small))
    network.save_pretrained(tmp_path)
    loaded = ResNetFPN(PyramidConfig(resnet="tiny", weights=str(tmp_path)), 16)
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in loaded.body.state_dict().items())
    named = {torchvision_name(f"body.{name}"): x.contiguous() for name, x in network.state_dict().items()}
    save_file(named, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=r"weights of a ResNet unfilled .*; train/tools/import_checkpoint.py reads"):
        ResNetFPN(PyramidConfig(resnet="tiny", weights=str(tmp_path)), 16)


def test_mistakes_are_one_line(files, tmp_path, capsys):
    for arguments, message in [
        (["--from", "torchvision", "nothing.pth", "--out", str(tmp_path / "x")], "nothing.pth is not a file"),
        (["--from", "sparsedrive", str(files / "torchvision.pth"), "--out", str(tmp_path / "x")], "no ResNet with"),
        (["--from", "torchvision", "x", "--out", str(files)], "exists already"),
    ]:
        with pytest.raises(SystemExit):
            import_checkpoint.main(arguments)
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


SETS = golden_sets("sparsedrive_names")


@pytest.mark.skipif(not SETS, reason="no golden list of SparseDrive's names beside the checkout")
@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_the_released_sparsedrives_backbone_is_filled(folder):
    entries = json.loads((folder.folder / "names.json").read_text())["entries"]
    kinds = dict(float32=torch.float32, int64=torch.int64)
    state = {n: torch.zeros((), dtype=kinds[e["dtype"]]).expand(e["shape"]) for n, e in entries.items()}
    imported = import_backbone(state, "sparsedrive")
    assert imported.strides == STRIDES and imported.channels == 256
    assert {name.split(".")[0] for name in imported.left_behind} == {"depth_branch", "head"}
