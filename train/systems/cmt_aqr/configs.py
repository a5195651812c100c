"""System C: CMT with attention-bias query routing on cameras and LiDAR, its generations and ablations, and a tiny one
of each; `_tiny_frozen` ones are fine-tuned from a trained tiny one, as the documents fine-tune AQR.

The image backbone and the LiDAR branch up to its neck are frozen, as the documents have them; so give them weights:
`model.camera.weights=CKPT` for the ResNet, `--weights CKPT` for what an `unfrozen` run or a baseline has learned. A
frozen part that is random is refused. The `upstream` ones take CMT's released weights (train/tools/import_checkpoint.py
--from cmt).
"""

from collections.abc import Callable
from functools import partial

from ....modules.cmt_aqr.detector import UPSTREAM_RANGE, as_upstream
from .experiment import DetectionExperiment

_SIZE = "voxel0100_r50_800x320_cbgs"
_FROZEN = ("img_backbone", "pts_backbone", "pts_voxel_encoder", "pts_middle_encoder")


def cmt_aqr() -> DetectionExperiment:
    """The documents' v3: attention bias, learnable scale."""
    experiment = DetectionExperiment()
    optim, run, schedule = experiment.optim, experiment.run, experiment.schedule
    optim.lr, optim.weight_decay, optim.clip = 1.4e-4, 0.01, 35.0
    optim.base_batch, optim.decay = 16, "matrices"  # upstream's rate is for 8 × 2 samples
    schedule.kind, schedule.peak_factor, schedule.final_factor = "cyclic", 6.0, 1e-4
    experiment.model.grid_mask = 0.7
    optim.multipliers = {
        **dict.fromkeys(_FROZEN, 0.0),
        **dict.fromkeys(("img_neck", "pts_neck"), 0.05),
        **dict.fromkeys(("transformer", "query_embed", "shared_conv"), 0.5),
        "reference_points": 0.3,
        "task_heads": 0.8,
        "aqr_weight_generator": 1.0,
        "attention_bias_generator": 1.0,
        "attention_bias_generator.bias_scale": 0.5,
    }
    experiment.loader.batch_size = 2
    run.epochs, run.amp, run.ema = 20, "bfloat16", 0.999
    return experiment


def cmt() -> DetectionExperiment:
    """The baseline without AQR."""
    experiment = _without_scale("none")
    del experiment.optim.multipliers["aqr_weight_generator"]
    return experiment


def cmt_aqr_v1() -> DetectionExperiment:
    """Features are multiplied by the weights."""
    return _without_scale("v1")


def cmt_aqr_v2() -> DetectionExperiment:
    """Features are modulated by a tenth of the weights."""
    return _without_scale("v2")


def cmt_aqr_scale20() -> DetectionExperiment:
    """The scale begins at 2.0."""
    experiment = cmt_aqr()
    experiment.model.aqr.bias_scale = 2.0
    return experiment


def cmt_aqr_scale30() -> DetectionExperiment:
    """The scale begins at 3.0."""
    experiment = cmt_aqr()
    experiment.model.aqr.bias_scale = 3.0
    return experiment


def cmt_aqr_fixed() -> DetectionExperiment:
    """The scale stays at 2.5."""
    return _without_scale("v3")


def cmt_aqr_point() -> DetectionExperiment:
    """The weights are judged by one sample of each map."""
    experiment = cmt_aqr()
    experiment.model.aqr.evidence = "point"
    return experiment


def cmt_aqr_window8() -> DetectionExperiment:
    """Windows of 8 cells on both kinds of map."""
    experiment = cmt_aqr()
    experiment.model.aqr.window_sizes = (8, 8)
    return experiment


def cmt_aqr_1600x640() -> DetectionExperiment:
    """v3 at the documents' larger size, 180×180 and 6×40×100 cells, with ResNet-50 where they have VoVNet."""
    experiment = cmt_aqr()
    experiment.data.image_size, experiment.data.point_range = (640, 1600), (-54.0, -54.0, -3.0, 54.0, 54.0, 5.0)
    experiment.model.lidar.voxel_size = (0.075, 0.075, 0.2)
    experiment.model.aqr.window_sizes = (15, 5)
    return experiment


def cmt_aqr_unfrozen() -> DetectionExperiment:
    """Everything trains, the branches as slowly as their necks."""
    experiment = cmt_aqr()
    experiment.model.camera.frozen_stages = experiment.model.lidar.frozen_stages = -1
    experiment.model.camera.norm_eval = experiment.model.lidar.norm_eval = False
    experiment.optim.multipliers |= dict.fromkeys(_FROZEN, 0.05)
    return experiment


def cmt_upstream() -> DetectionExperiment:
    """CMT as its released weights know it, without AQR: to evaluate them, or as the baseline of `cmt_aqr_upstream`."""
    return _as_upstream(cmt())


def cmt_aqr_upstream() -> DetectionExperiment:
    """v3 on CMT's released weights."""
    return _as_upstream(cmt_aqr())


def _as_upstream(experiment: DetectionExperiment) -> DetectionExperiment:
    as_upstream(experiment.model)
    experiment.data.frame, experiment.data.point_range = "lidar", UPSTREAM_RANGE
    del experiment.optim.multipliers["pts_voxel_encoder"]  # a mean has no parameters
    return experiment


def _without_scale(generation: str) -> DetectionExperiment:
    """Without a scale that learns, `attention_bias_generator` has no parameter."""
    experiment = cmt_aqr()
    experiment.model.aqr.generation, experiment.model.aqr.learnable_scale = generation, False
    for pattern in ("attention_bias_generator", "attention_bias_generator.bias_scale"):
        del experiment.optim.multipliers[pattern]
    return experiment


def _tiny(make: Callable[[], DetectionExperiment]) -> DetectionExperiment:
    """Takes smaller numbers for the same code: some minutes of one core. Its weights are random, so everything trains.
    What it learns, and does not: docs/detector.md."""
    experiment = make()
    model, data, run, optim = experiment.model, experiment.data, experiment.run, experiment.optim
    data.image_size, data.sweeps, data.resize, data.cbgs = (96, 160), 1, (1.0, 1.0), False
    data.point_range = (-38.4, -38.4, -3.0, 38.4, 38.4, 5.0)
    data.bev_rotation, data.bev_scale, data.bev_flip, data.bev_translation = 0.0, (1.0, 1.0), False, 0.0
    data.flip, data.sampled_epochs, model.grid_mask = False, 0, 0.0
    data.p_no_image = 0.0  # images are what it reads last
    model.channels, model.queries, model.depths, model.denoising_groups = 64, 150, 16, 5
    if model.encoding == "metric":
        model.nearness, model.dense = 3.0, True
    model.camera.resnet, model.camera.frozen_stages, model.camera.norm_eval = "tiny", -1, False
    lidar, decoder = model.lidar, model.decoder
    lidar.voxel_size, lidar.grid, lidar.last_z_padding = (0.8, 0.8, 2.0), None, 1
    lidar.channels, lidar.blocks = (16, 32), 1
    lidar.second, lidar.layers, lidar.frozen_stages, lidar.norm_eval = (32, 64), 1, -1, False
    decoder.layers, decoder.heads, decoder.feedforward, decoder.dropout = 2, 4, 128, 0.0
    model.aqr.channels, model.aqr.feedforward = 64, 128
    optim.lr, optim.base_batch, optim.multipliers = 1e-3, 0, dict.fromkeys(optim.multipliers, 1.0)
    experiment.schedule.kind, experiment.schedule.warmup_steps = "cosine", 20
    experiment.loader.batch_size, experiment.loader.workers = 2, 0
    run.epochs, run.evaluate_epochs, run.log_steps, run.amp = 6, 6, 20, "float32"
    run.ema = 0.0
    return experiment


def _tiny_frozen(make: Callable[[], DetectionExperiment]) -> DetectionExperiment:
    """The tiny one with the documents' freezing, multipliers and lost sensors, to be fine-tuned from a trained one."""
    experiment, documents = _tiny(make), make()
    for branch in ("camera", "lidar"):
        own, theirs = getattr(experiment.model, branch), getattr(documents.model, branch)
        own.frozen_stages, own.norm_eval = theirs.frozen_stages, theirs.norm_eval
    experiment.optim.multipliers = documents.optim.multipliers
    experiment.data.p_no_image = documents.data.p_no_image
    experiment.run.epochs = experiment.run.evaluate_epochs = 1
    return experiment


_FULL = {
    f"cmt_aqr_{_SIZE}": cmt_aqr,
    f"cmt_{_SIZE}": cmt,
    f"cmt_aqr_v1_{_SIZE}": cmt_aqr_v1,
    f"cmt_aqr_v2_{_SIZE}": cmt_aqr_v2,
    f"cmt_aqr_scale20_{_SIZE}": cmt_aqr_scale20,
    f"cmt_aqr_scale30_{_SIZE}": cmt_aqr_scale30,
    f"cmt_aqr_fixed_{_SIZE}": cmt_aqr_fixed,
    f"cmt_aqr_point_{_SIZE}": cmt_aqr_point,
    f"cmt_aqr_window8_{_SIZE}": cmt_aqr_window8,
    f"cmt_aqr_unfrozen_{_SIZE}": cmt_aqr_unfrozen,
    f"cmt_upstream_{_SIZE}": cmt_upstream,
    f"cmt_aqr_upstream_{_SIZE}": cmt_aqr_upstream,
    "cmt_aqr_voxel0075_vov_1600x640_cbgs": cmt_aqr_1600x640,
}
_TUNED = (cmt, cmt_aqr, cmt_aqr_v1, cmt_aqr_v2, cmt_aqr_scale20, cmt_aqr_scale30, cmt_aqr_fixed, cmt_aqr_point)
EXPERIMENTS: dict[str, Callable[[], DetectionExperiment]] = dict(_FULL)
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in _FULL.items()}
EXPERIMENTS |= {f"{name}_tiny_frozen": partial(_tiny_frozen, make) for name, make in _FULL.items() if make in _TUNED}
