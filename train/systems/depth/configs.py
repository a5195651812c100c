"""Depth from images with LiDAR as the truth, with objects or without, at the documents' size and a tiny one.

It gives a backbone whose features mean something; completion and others take its checkpoint:
`--cfg-options model.backbone.weights=work_dirs/depth_tiny/checkpoints/best.pt`.
"""

from collections.abc import Callable
from functools import partial

from ....modules.detection.boxes import DETECTION_CLASSES
from ...data.map_truth import MAP_CLASSES
from .experiment import DepthExperiment


def depth() -> DepthExperiment:
    """ResNet-50 and its pyramid at the documents' strides; give it weights of others to begin with."""
    experiment = DepthExperiment()
    experiment.loader.batch_size, experiment.run.epochs, experiment.run.amp = 4, 12, "bfloat16"
    experiment.optim.decay = "matrices"
    return experiment


def depth_objects() -> DepthExperiment:
    """The same, and what the points in each cell lie on: a backbone for detection and maps, taught by every box and map
    line at once."""
    experiment = depth()
    experiment.model.classes = (*DETECTION_CLASSES, *MAP_CLASSES)
    return experiment


def _tiny(make: Callable[[], DepthExperiment]) -> DepthExperiment:
    """Takes smaller numbers for the same code: those of the tiny completion's backbone."""
    experiment = make()
    model, data, run = experiment.model, experiment.data, experiment.run
    data.image_size = (96, 160)
    model.channels, model.bins = 64, 32
    model.backbone.resnet, model.backbone.strides = "tiny", (8, 16)
    experiment.optim.lr, experiment.schedule.warmup_steps = 4e-3, 20
    experiment.loader.batch_size, experiment.loader.workers = 4, 0
    run.epochs, run.evaluate_epochs, run.log_steps, run.amp = 12, 4, 20, "float32"
    return experiment


EXPERIMENTS: dict[str, Callable[[], DepthExperiment]] = {make.__name__: make for make in (depth, depth_objects)}
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in list(EXPERIMENTS.items())}
