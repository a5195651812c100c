"""The driving head on upstream's weights gives upstream's numbers: layer by layer, moment after moment, and losses."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rigfuse.modules.sparse_drive.losses import LOSS_WEIGHTS, DriveTruth, drive_losses
from rigfuse.modules.sparse_drive.results import ResultConfig, read_results
from rigfuse.modules.sparse_drive.upstream_names import head_name, operations
from support.golden import golden_sets
from support.golden_head import Moments, golden_head

SETS = golden_sets("sparsedrive_head")
pytestmark = pytest.mark.skipif(not SETS, reason="no golden set of the driving head beside the checkout")
each_set = pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
TRAJECTORIES = ("motion/prediction", "planning/prediction", "trajs_3d", "planning", "final_planning")
LOSSES = {
    "det_cls": "det_loss_cls",
    "det_box": "det_loss_box",
    "det_centredness": "det_loss_cns",
    "det_yawness": "det_loss_yns",
    "map_cls": "map_loss_cls",
    "map_line": "map_loss_line",
    "motion_cls": "motion_loss_cls",
    "motion_reg": "motion_loss_reg",
    "plan_cls": "planning_loss_cls",
    "plan_reg": "planning_loss_reg",
    "plan_status": "planning_loss_status",
}


@cache
def streamed(folder):
    """Outputs and states of all moments, what every operation gave, and the head. In float64, so that what is left is
    upstream's own rounding: in float32 ours, which depends on the machine, comes near the tolerance after some moments.
    """
    head, moments = golden_head(folder).double(), Moments(folder)
    seen, hooks = [], []
    modules = dict(head.named_modules())
    for name, order in operations(head.config).items():
        for number, (_, module) in enumerate(order):
            key = f"{name}.layers.{number}"
            hook = lambda _, __, found, key=key: seen[-1].__setitem__(key, found)  # noqa: E731
            hooks.append(modules[module].register_forward_hook(hook))
    state, results = None, []
    for moment in range(moments.count):
        seen.append({})
        with torch.no_grad():
            maps = [level.double() for level in moments.maps(moment)]
            output, state = head(maps, moments.frame(moment), moments.image_size, state)
        results.append((output, state))
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(head=head, moments=moments, results=results, seen=seen)


class Comparison:
    """Holds arrays of a file to their tolerances, and each array of it to being looked at."""

    def __init__(self, folder, file, prefix):
        self.tolerance = folder.about["tolerance"]
        self.arrays = {k: v for k, v in folder.load(file).items() if k.startswith(prefix)}
        self.prefix, self.unseen = prefix, set(self.arrays)

    def __call__(self, name, actual, where=None, trajectory=False):
        expected = torch.from_numpy(np.asarray(self.arrays[self.prefix + name]))
        self.unseen.discard(self.prefix + name)
        actual = torch.as_tensor(actual).reshape(expected.shape)
        if where is not None:
            actual, expected = actual[where], expected[where]
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), self.prefix + name
            return
        first = "frame0" if self.prefix.startswith("frame0") else "other"
        trajectory = trajectory or any(name == t or name.startswith(f"{t}/") for t in TRAJECTORIES)
        limit = self.tolerance["trajectories" if trajectory else first]
        error = (actual - expected).abs().max() if expected.numel() else 0
        assert error <= limit, f"{self.prefix}{name}: error {error:.2e}, limit {limit:.0e}"


@each_set
def test_outputs_and_state_of_every_moment(folder):
    run = streamed(folder)
    for moment, (output, state) in enumerate(run.results):
        equal = Comparison(folder, "outputs", f"frame{moment}/")
        compare_predictions(equal, output)
        for name, found in (("det", output.detection), ("map", output.lines)):
            equal(f"{name}/instance_feature", found.feature)
            equal(f"{name}/anchor_embed", found.embedding)
        equal("det/instance_id", output.detection.ids)
        compare_queues(equal, output.motion, state.motion, run.head.config.motion.queue)
        for name, bank in (("det", state.detection), ("map", state.lines)):
            here = f"state/{name}_head.instance_bank"
            equal(f"{here}/cached_feature", bank.feature)
            equal(f"{here}/cached_anchor", bank.anchor)
            equal(f"{here}/confidence", bank.confidence)
        padded = torch.nn.functional.pad(state.detection.ids, (0, output.detection.ids.shape[1] - bank_size(state)))
        kept = torch.arange(padded.shape[1]) < bank_size(state)
        equal("state/det_head.instance_bank/instance_id", padded, where=kept.expand_as(padded))
        assert len(set(state.detection.next_id.tolist())) == 1
        equal("state/det_head.instance_bank/prev_id", state.detection.next_id[0])
        # What upstream keeps besides: masks of its own bookkeeping, and the confidences before the best were taken.
        left = {name.rpartition("/")[2] for name in equal.unseen}
        assert left <= {"mask", "temp_confidence", "prev_id"}, left


def bank_size(state):
    return state.detection.ids.shape[1]


def compare_predictions(equal, output):
    for layer, (logits, anchors, quality) in enumerate(zip(*vars_of(output.detection))):
        equal(f"det/classification/{layer}", logits)
        equal(f"det/prediction/{layer}", anchors)
        equal(f"det/quality/{layer}", quality)
    for layer, (logits, anchors) in enumerate(zip(output.lines.logits, output.lines.anchors)):
        equal(f"map/classification/{layer}", logits)
        equal(f"map/prediction/{layer}", anchors)
    equal("motion/classification/0", output.motion.logits)
    equal("motion/prediction/0", output.motion.steps)
    equal("planning/classification/0", output.motion.plan_logits)
    equal("planning/prediction/0", output.motion.plan_steps)
    equal("planning/status/0", output.motion.status)


def vars_of(found):
    return found.logits, found.anchors, found.quality


def compare_queues(equal, motion, state, length):
    """Upstream's queues grow to their length, and keep what is no longer anybody's past."""
    period, agents = motion.period, motion.period.shape[1] - 1
    equal("motion/period", period[:, :-1])
    equal("planning/period", period[:, -1:])
    equal("state/instance_queue/period", state.period[:, :-1])
    equal("state/instance_queue/ego_period", state.period[:, -1:])
    equal("state/instance_queue/prev_ego_status", state.status)
    equal("state/instance_queue/prev_confidence", state.confidence)
    equal("state/instance_queue/prev_instance_id", state.ids)
    filled = sum(f"{equal.prefix}motion/anchor_queue/{place}" in equal.arrays for place in range(length))
    for place in range(filled):
        ours = length - filled + place
        real = period >= length - ours
        for name, tensor in (("anchor_queue", motion.past), ("state anchor", state.anchor), ("feature", state.feature)):
            agent, ego = tensor[:, :agents, ours], tensor[:, agents:, ours]
            names = {
                "anchor_queue": ("motion/anchor_queue", "planning/anchor_queue"),
                "state anchor": ("state/instance_queue/anchor_queue", "state/instance_queue/ego_anchor_queue"),
                "feature": ("state/instance_queue/instance_feature_queue", "state/instance_queue/ego_feature_queue"),
            }[name]
            equal(f"{names[0]}/{place}", agent, where=real[:, :agents])
            equal(f"{names[1]}/{place}", ego, where=real[:, agents:])


@each_set
def test_every_layer(folder):
    if not folder.settings.get("intermediates", True):
        pytest.skip("the set holds no intermediate values")
    run = streamed(folder)
    for moment, seen in enumerate(run.seen[:2]):
        equal = Comparison(folder, "intermediate", f"frame{moment}/")
        assert equal.arrays
        for name, found in seen.items():
            if hasattr(found, "anchor"):  # a refinement of boxes or lines
                found = (found.anchor, found.logits, found.quality)
            if isinstance(found, tuple):
                for index, part in enumerate(found):
                    if part is not None:
                        equal(f"{name}/{index}", part, trajectory=name.startswith("motion") and index in (1, 3))
            else:
                equal(name, found)
        assert not equal.unseen


@each_set
def test_decoded_results(folder):
    """With upstream's rules, see `ResultConfig`; the class scores stand beside their boxes here, upstream's do not."""
    run = streamed(folder)
    config = ResultConfig(boxes=folder.settings["decoded_boxes"], rescore_shift=0.0, rescore_overlap="corners")
    for moment, (output, _) in enumerate(run.results):
        results = read_results(output, run.moments.command(moment), run.head.config, config)
        for sample, result in enumerate(results):
            equal = Comparison(folder, "decoded", f"frame{moment}/sample{sample}/")
            compare_result(equal, result, run.head.config.motion.queue)
            assert not equal.unseen


def compare_result(equal, result, length):
    equal("boxes_3d", result.boxes)
    equal("scores_3d", result.scores)
    equal("labels_3d", result.labels)
    equal("instance_ids", result.ids)
    equal("cls_scores", result.class_scores.sort(descending=True).values)
    equal("map_vectors", result.lines)
    equal("map_scores", result.line_scores)
    equal("map_labels", result.line_labels)
    equal("trajs_3d", result.futures)
    equal("trajs_score", result.future_scores)
    equal("period", result.period)
    equal("planning", result.plans)
    equal("planning_score", result.plan_scores)
    equal("final_planning", result.plan)
    filled = equal.arrays[f"{equal.prefix}anchor_queue"].shape[1]
    real = result.period[:, None] >= torch.arange(filled, 0, -1)
    equal("anchor_queue", result.past[:, length - filled :], where=real)
    equal.unseen -= {f"{equal.prefix}{name}" for name in ("ego_period", "ego_anchor_queue")}  # compared as outputs


def truth_of(folder, moments, without_last=False):
    arrays = {
        name: torch.from_numpy(np.asarray(value)) for name, value in folder.load("losses").items() if "gt/" in name
    }
    per_sample = lambda name: [arrays[f"gt/{name}/{sample}"] for sample in range(folder.settings["batch"])]  # noqa: E731
    lists = {name: per_sample(name) for name in ("boxes", "labels", "lines", "mlabels", "agent", "amask")}
    if without_last:
        lists = {name: [*tensors[:-1], tensors[-1][:0]] for name, tensors in lists.items()}
    return DriveTruth(
        lists["boxes"], lists["labels"], lists["lines"], lists["mlabels"], lists["agent"],
        [mask.bool() for mask in lists["amask"]], arrays["gt/ego"], arrays["gt/emask"].bool(),
        moments.command(1), moments.array(1, "ego_status"),
    )  # fmt: skip


@each_set
@pytest.mark.parametrize("case", ["full_eval", "empty_eval", "full_train"])
def test_losses_matches_and_gradients(folder, case):
    head, moments = golden_head(folder), Moments(folder)
    if case == "full_train":
        head.train()
        for module in head.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        for decoder in (head.config.detection, head.config.lines):
            decoder.deformable.keypoint_dropout = 0.0
    with torch.no_grad():
        _, state = head(moments.maps(0), moments.frame(0), moments.image_size)
    maps = [level.requires_grad_() for level in moments.maps(1)]
    output, _ = head(maps, moments.frame(1), moments.image_size, state)
    losses = drive_losses(output, truth_of(folder, moments, case == "empty_eval"), head.config)
    equal = Comparison(folder, "losses", f"{case}/")
    compare_losses(equal, losses)
    compare_matches(equal, losses, folder.settings["batch"])
    if case == "full_train":
        inner = Comparison(folder, "losses", "full_train/out/")
        compare_predictions(inner, output)

    total = sum(LOSS_WEIGHTS[name] * value for name, value in losses.total.items())
    relative(equal, "total", total, "losses_relative")
    total.backward()
    compare_gradients(equal, head, maps, folder.settings)


def relative(equal, name, actual, kind, floor=0.0):
    expected = torch.from_numpy(np.asarray(equal.arrays[equal.prefix + name]))
    actual = actual.detach().reshape(expected.shape)
    error = ((actual - expected).abs() / expected.abs().clamp(min=max(floor, 1e-12))).max()
    assert error <= equal.tolerance[kind], f"{equal.prefix}{name}: relative error {error:.2e}"


def compare_losses(equal, losses):
    for name, theirs in LOSSES.items():
        for layer, value in enumerate(losses.layers[name]):
            relative(equal, f"loss/{theirs}_{layer}", LOSS_WEIGHTS[name] * value, "losses_relative", floor=1e-3)
    assert sum("/loss/" in name for name in equal.arrays) == sum(len(values) for values in losses.layers.values())


def compare_matches(equal, losses, batch):
    for layer in range(len(losses.boxes)):
        for sample in range(batch):
            boxes, lines = losses.boxes[layer][sample], losses.lines[layer][sample]
            equal(f"match_det/layer{layer}/sample{sample}", torch.stack([boxes.instance, boxes.truth]))
            equal(f"match_map/layer{layer}/sample{sample}", torch.stack([lines.instance, lines.truth, lines.order]))


def compare_gradients(equal, head, maps, settings):
    """Norms of every parameter's gradient and of all; those of single parameters and of the coarsest maps in full."""
    ours = dict(head.named_parameters())
    norms = [name for name in equal.arrays if "/grad_norm/" in name]
    total = float(equal.arrays[f"{equal.prefix}grad_norm_all"])
    assert len(norms) > 100
    for key in norms:
        parameter = ours[head_name(key.rpartition("/")[2], head.config)]
        norm = torch.zeros(()) if parameter.grad is None else parameter.grad.norm()
        relative(equal, key.removeprefix(equal.prefix), norm, "grad_norms_relative", floor=1e-3 * total)
    gradients = [parameter.grad.norm() for parameter in ours.values() if parameter.grad is not None]
    relative(equal, "grad_norm_all", torch.stack(gradients).norm(), "grad_norms_relative")
    for level, gradient in enumerate(m.grad for m in maps):
        norms = gradient.norm(dim=2).flatten(2).norm(dim=2)
        relative(equal, f"grad_feature_maps_norm/{level}", norms, "grad_norms_relative", floor=1e-3)
    coarsest = len(maps) - 1
    expected = torch.from_numpy(equal.arrays[f"{equal.prefix}grad_feature_maps/{coarsest}"])
    error = (maps[coarsest].grad - expected).norm() / expected.norm()
    assert error <= equal.tolerance["grad_norms_relative"]
