"""Where the parameters of SparseDrive's own checkpoints go: their names to the names of this toolkit.

Upstream lists the operations of its decoders one after another, `layers.17`; here each has a name in its layer. Which
number is which operation follows from the configuration, so the table is made for one.
"""

from collections.abc import Iterable

import torch

from ..backbone_names import resnet_name
from .head import HeadConfig

# Carries no information: zeros that upstream's code creates and never reads.
UNUSED = "det_head.instance_bank.anchor_handler.fix_scale"

_PARTS = {  # operation → name of the module, then names inside it
    "temp_gnn": ("temporal", {"attn": "attention"}),
    "gnn": ("attention", {"attn": "attention"}),
    "deformable": (
        "deformable",
        {
            "kps_generator.fix_scale": "keypoints.fixed",
            "kps_generator.learnable_fc": "keypoints.{learned}",
            "output_proj": "out",
            "camera_encoder": "camera",
            "weights_fc": "weights",
        },
    ),
    "ffn": (
        "feedforward",
        {"pre_norm": "norm", "layers.0.0": "expand", "layers.1": "reduce", "identity_fc": "shortcut"},
    ),
    "refine": (
        "refine",
        {"layers.11.scale": "scale", "layers": "offset", "cls_layers": "classes", "quality_layers": "quality"},
    ),
}
_MOTION = {
    "temp_gnn": ("temporal", {"attn": "attention"}),
    "gnn": ("agents", {"attn": "attention"}),
    "cross_gnn": ("lines", {"attn": "attention"}),
    "ffn": _PARTS["ffn"],
}
_MOTION_REFINE = {
    "motion_cls_branch": "logits",
    "motion_reg_branch": "steps",
    "plan_cls_branch": "plan_logits",
    "plan_reg_branch": "plan_steps",
    "plan_status_branch": "status",
}
_DECODER = {
    "instance_bank.anchor": "bank.anchor",
    "instance_bank.instance_feature": "bank.feature",
    "anchor_encoder.pos_fc": "encoder.position",
    "anchor_encoder.size_fc": "encoder.size",
    "anchor_encoder.yaw_fc": "encoder.yaw",
    "anchor_encoder.vel_fc": "encoder.velocity",
    "fc_before": "mixing.widen",
    "fc_after": "mixing.narrow",
}
_PLANNER = {
    "motion_anchor": "motion_anchor",
    "plan_anchor": "plan_anchor",
    "instance_queue.ego_anchor": "ego_anchor",
    "instance_queue.ego_feature_encoder": "ego_encoder.layers",
    "motion_anchor_encoder": "motion_encoder",
    "plan_anchor_encoder": "plan_encoder",
    "fc_before": "mixing.widen",
    "fc_after": "mixing.narrow",
}
_NECK = {"lateral_convs": "lateral", "fpn_convs": "smooth"}


def operations(config: HeadConfig) -> dict[str, list[tuple[str, str]]]:
    """For each of upstream's heads, what the numbers of its layers are: (operation, name of the module here)."""
    return dict(
        det_head=_decoder_operations("detection", config.detection),
        map_head=_decoder_operations("lines", config.lines),
        motion_plan_head=_motion_operations(config.motion.layers) if config.with_motion else [],
    )


def _decoder_operations(name, config):
    order = []
    for index in range(config.layers):
        here = f"{name}.layers.{index}"
        if index >= config.single_frame_layers:
            order.append(("temp_gnn", f"{here}.temporal"))
        if index > 0 or config.first_attention:
            order += [("gnn", f"{here}.attention"), ("norm", f"{here}.attention_norm")]
        order += [("deformable", f"{here}.deformable"), ("ffn", f"{here}.feedforward"), ("norm", f"{here}.norm")]
        order.append(("refine", f"{here}.refine"))
    return order


def _motion_operations(layers):
    order = []
    for index in range(layers):
        here = f"motion.layers.{index}"
        order += [("temp_gnn", f"{here}.temporal"), ("gnn", f"{here}.agents"), ("norm", f"{here}.agents_norm")]
        order += [("cross_gnn", f"{here}.lines"), ("norm", f"{here}.lines_norm")]
        order += [("ffn", f"{here}.feedforward"), ("norm", f"{here}.norm")]
    return [*order, ("refine", "motion.refine")]


def head_name(name: str, config: HeadConfig) -> str | None:
    """The parameter of `SparseDriveHead` that upstream calls `name` (below `head.`); None for `UNUSED`.

    Raises:
        ValueError: upstream has no such parameter in this configuration.
    """
    if name == UNUSED:
        return None
    head, _, rest = name.partition(".")
    tables = dict(det_head=("detection", _DECODER), map_head=("lines", _DECODER), motion_plan_head=("motion", _PLANNER))
    if head in tables:
        ours, table = tables[head]
        if not rest.startswith("layers."):
            return _joined(ours, _renamed(rest, table, name))
        _, number, inside = rest.split(".", 2)
        order = operations(config)[head]
        if number.isdecimal() and int(number) < len(order):
            operation, module = order[int(number)]
            return _joined(module, _inside(head, operation, inside, name))
    raise ValueError(_unknown(name))


def _inside(head, operation, inside, name):
    if operation == "norm":
        return inside
    if head == "motion_plan_head":
        table = _MOTION_REFINE if operation == "refine" else _MOTION[operation][1]
    else:
        table = _PARTS[operation][1]
    # The places that a module chooses are learned keypoints of a box, offsets from the points of a line.
    return _renamed(inside, table, name).replace("{learned}", "learned" if head == "det_head" else "offset")


def model_name(name: str, config: HeadConfig) -> str | None:
    """The same for the whole network: the name in `SparseDrive` of any parameter or buffer of a checkpoint."""
    part, _, rest = name.partition(".")
    if part == "head":
        ours = head_name(rest, config)
        return None if ours is None else f"head.{ours}"
    if part == "img_backbone":
        ours = resnet_name(rest)
        if ours is None:
            raise ValueError(_unknown(name))
        return f"backbone.body.{ours}"
    if part == "img_neck":
        level, _, parameter = rest.partition(".")[2].partition(".conv.")
        return f"backbone.fpn.{_renamed(rest.partition('.')[0], _NECK, name)}.{level}.{parameter}"
    if part == "depth_branch":
        return f"depth.{_renamed(rest, {'depth_layers': 'layers'}, name)}"
    raise ValueError(_unknown(name))


def convert(state: dict[str, torch.Tensor], names: Iterable[str], rename) -> dict[str, torch.Tensor]:
    """An upstream state dict under the names of this toolkit.

    Args:
        state: by upstream's names.
        names: every name that the model has.
        rename: e.g. `lambda name: model_name(name, config)`.

    Raises:
        ValueError: a name that finds no place, or parameters that stay unfilled; all of them are listed.
    """
    found, homeless = {}, []
    names = set(names)
    for name, tensor in state.items():
        try:
            ours = rename(name)
        except ValueError:
            ours = name
        if ours is not None and ours not in names:
            homeless.append(name)
        elif ours is not None:
            found[ours] = tensor
    unfilled = sorted(names - found.keys())
    if homeless or unfilled:
        parts = [f"no place for {', '.join(homeless)}"] if homeless else []
        parts += [f"nothing for {', '.join(unfilled)}"] if unfilled else []
        raise ValueError(f"the checkpoint does not fit: {'; '.join(parts)}")
    return found


def _renamed(inside, table, name):
    """`inside` with the first prefix of the table that fits replaced."""
    for theirs, ours in table.items():
        if inside == theirs or inside.startswith(f"{theirs}."):
            return ours + inside[len(theirs) :]
    raise ValueError(_unknown(name))


def _joined(*parts):
    return ".".join(part for part in parts if part)


def _unknown(name):
    return f"SparseDrive has no parameter {name!r} in this configuration"
