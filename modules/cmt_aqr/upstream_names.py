"""Where the parameters of CMT's own checkpoints go: their names and layouts to those of this toolkit."""

import re

import torch

from ..backbone_names import pyramid_name, resnet_name

INTENSITY = 255.0  # upstream's points have intensities of 0 to 255, those here 0 to 1

_HEAD = "pts_bbox_head."
_ATTENTIONS = ("self_attention", "cross_attention")
_TASKS = dict(center="center", height="height", dim="dim", rot="rot", vel="vel", cls_logits="logits")
_LAYER = re.compile(r"transformer\.decoder\.layers\.(\d+)\.(attentions|norms|ffns)\.(\d+)\.(.+)")
_TASK = re.compile(r"task_heads\.0\.(\w+)\.(\d)\.(weight|bias)")
_FEEDFORWARD = {"layers.0.0": "0", "layers.1": "3"}
_SPARSE = re.compile(r"encoder_layers\.encoder_layer(\d+)\.(\d+)\.(.+)")
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def converted(name: str, tensor: torch.Tensor, layers: int) -> dict[str, torch.Tensor]:
    """A tensor of a checkpoint under the names, and in the layout, of `CmtAqr`: one, or three for a joint projection.

    The names below `pts_bbox_head.` are known without that prefix too.

    Args:
        name: upstream's.
        tensor: parameter, buffer, or the gradient of one.
        layers: of the decoder.

    Raises:
        ValueError: upstream has no such name, or the tensor cannot be laid out anew.
    """
    part, _, rest = name.partition(".")
    if part in _BRANCHES:
        ours, tensor = _BRANCHES[part](rest, tensor)
        found = None if ours is None else {f"{part}.{ours}": tensor}
    else:
        found = _head(name.removeprefix(_HEAD), tensor, layers)
    if found is None:
        raise ValueError(f"CMT has no parameter {name!r}")
    return found


def convert(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A whole checkpoint for a network whose state is `own`; what the routing adds has no part in it.

    Raises:
        ValueError: a name that finds no place, a parameter that stays unfilled, or another shape; all are listed.
    """
    found, homeless = {}, []
    for name, tensor in state.items():
        try:
            found |= converted(name, tensor, layers)
        except (ValueError, RuntimeError):
            homeless.append(name)
    problems = [f"no place for {', '.join(homeless)}"] if homeless else []
    surplus = [name for name in found if name not in own]
    problems += [f"the network here has no {', '.join(surplus)}"] if surplus else []
    unfilled = [name for name in own if name not in found and name.split(".")[0] not in ROUTING]
    problems += [f"nothing for {', '.join(unfilled)}"] if unfilled else []
    problems += [
        f"{name} is {tuple(tensor.shape)}, needs {tuple(own[name].shape)}"
        for name, tensor in found.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"the weights of cmt do not fit: {'; '.join(problems)}")
    return found


ROUTING = ("aqr_weight_generator", "attention_bias_generator")  # the parts that upstream does not have


def _image_backbone(name, tensor):
    if name == "conv1.weight":
        tensor = tensor.flip(1)  # upstream's images are BGR
    ours = resnet_name(name)
    return ours and f"body.{ours}", tensor


def _image_neck(name, tensor):
    return pyramid_name(name, laterals=2), tensor


def _points_backbone(name, tensor):
    """blocks.0.4.bias → stages.0.1.1.bias: convolution, norm and ReLU, over and over."""
    _, stage, place, parameter = name.split(".", 3)
    return f"stages.{stage}.{int(place) // 3}.{int(place) % 3}.{parameter}", tensor


def _points_neck(name, tensor):
    """Theirs is a convolution where nothing is enlarged, ours a transposed one throughout."""
    _, block, place, parameter = name.split(".", 3)
    if block == "0" and place == "0":
        tensor = tensor.transpose(0, 1)
    return f"blocks.{block}.{place}.{parameter}", tensor


def _middle_encoder(name, tensor):
    tensor = _kernel(tensor) if tensor.ndim == 5 else tensor
    part, _, inside = name.partition(".")
    if part == "conv_input":
        if inside == "0.weight":
            tensor = tensor.clone()
            tensor[:, 3] *= INTENSITY
        return f"stem.{_conv_and_norm(inside)}", tensor
    if part == "conv_out":
        return f"collapse.{_conv_and_norm(inside)}", tensor
    match = _SPARSE.fullmatch(name)
    if match is None:
        return None, tensor
    stage, place, inside = int(match[1]) - 1, int(match[2]), match[3]
    if inside[0].isdecimal():  # what halves stands at the end of a stage there, and begins the next one here
        return f"stages.{stage + 1}.0.{_conv_and_norm(inside)}", tensor
    block = f"stages.{stage}.{place + (stage > 0)}"
    layer, _, parameter = inside.partition(".")
    kinds = dict(conv1="block.conv", bn1="block.norm", conv2="conv", bn2="norm")
    return (f"{block}.{kinds[layer]}.{parameter}" if layer in kinds else None), tensor


def _kernel(tensor):
    """spconv's weight of a convolution, of version 2 (out, z, y, x, in) or 1 (z, y, x, in, out) → (z·y·x, in, out)."""
    if tensor.shape[0] > 3:  # kernels have at most 3 cells along an axis
        tensor = tensor.movedim(0, -1)
    return tensor.flatten(0, 2)


def _conv_and_norm(inside):
    place, _, parameter = inside.partition(".")
    return f"{('conv', 'norm')[int(place)]}.{parameter}"


def _head(name, tensor, layers):
    if match := _LAYER.fullmatch(name):
        return _decoder(*match.groups(), tensor)
    if match := _TASK.fullmatch(name):
        return _task(*match.groups(), tensor, layers)
    part, _, inside = name.partition(".")
    if part == "shared_conv":
        place, _, parameter = inside.partition(".")
        return {f"shared_conv.{('conv', 'bn').index(place)}.{parameter}": tensor}
    if part in ("bev_embedding", "rv_embedding"):
        return {f"query_embed.{name}": tensor}
    if name == "reference_points.weight":
        return {"reference_points": tensor}
    if name.startswith("transformer.decoder.post_norm."):
        return {name.replace("decoder.post_norm", "norm"): tensor}
    return None


def _decoder(layer, kind, index, inside, tensor):
    here = f"transformer.layers.{layer}"
    if kind == "norms":
        return {f"{here}.norms.{index}.{inside}": tensor}
    if kind == "ffns":
        place, _, parameter = inside.rpartition(".")
        return {f"{here}.feedforward.{_FEEDFORWARD[place]}.{parameter}": tensor} if place in _FEEDFORWARD else None
    here = f"{here}.{_ATTENTIONS[int(index)]}"
    if inside.startswith("attn.out_proj."):
        return {f"{here}.out.{inside.rpartition('.')[2]}": tensor}
    parameter = inside.removeprefix("attn.in_proj_")
    if parameter not in ("weight", "bias"):
        return None
    return {f"{here}.{part}.{parameter}": x for part, x in zip(("query", "key", "value"), tensor.chunk(3))}


def _task(task, place, parameter, tensor, layers):
    """Grouped convolutions with a group for each layer → products stacked over the layers."""
    kinds = {
        ("0", "weight"): "weight_in",
        ("1", "weight"): "norm_scale",
        ("1", "bias"): "norm_shift",
        ("3", "weight"): "weight_out",
        ("3", "bias"): "bias_out",
    }
    if task not in _TASKS or (place, parameter) not in kinds:
        return None
    tensor = tensor.unflatten(0, (layers, -1))
    tensor = tensor[..., 0].mT if tensor.ndim == 4 else tensor[:, None]
    return {f"task_heads.tasks.{_TASKS[task]}.{kinds[place, parameter]}": tensor}


_BRANCHES = dict(
    img_backbone=_image_backbone,
    img_neck=_image_neck,
    pts_backbone=_points_backbone,
    pts_neck=_points_neck,
    pts_middle_encoder=_middle_encoder,
)
