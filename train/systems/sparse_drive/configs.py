"""The sparse driving model: stages 1 and 2 at upstream's size and at the documents', and a tiny one of each.

Stage 1 learns detection and map; stage 2 begins with its weights (`--weights CKPT`) and learns motion and planning too.
Anchors come from the training split by train/tools/make_anchors.py (`anchors=FILE`).
"""

from collections.abc import Callable
from functools import partial

from ....modules.sparse_drive.network import tiny
from .experiment import DriveExperiment


def sparsedrive_small_stage1() -> DriveExperiment:
    """Detection, tracking and map: SparseDrive small's first stage, 256×704."""
    experiment = DriveExperiment()
    data, optim, run = experiment.data, experiment.optim, experiment.run
    experiment.model.head.with_motion = False
    data.image_size, data.resize, data.rotation = (256, 704), (1.0, 1.07), 5.4
    optim.lr, optim.base_batch, optim.weight_decay, optim.clip = 4e-4, 64, 1e-3, 25.0
    optim.multipliers = {"backbone.body": 0.5}
    experiment.schedule.warmup_steps, experiment.schedule.warmup_factor = 500, 1 / 3
    experiment.schedule.final_factor = 1e-3
    experiment.loader.batch_size = 8
    run.epochs, run.evaluate_epochs, run.amp = 100, 20, "bfloat16"
    return experiment


def sparsedrive_small_stage2() -> DriveExperiment:
    """All tasks, from the weights of stage 1."""
    experiment = sparsedrive_small_stage1()
    experiment.model.head.with_motion = True
    experiment.optim.lr, experiment.optim.base_batch = 3e-4, 48
    experiment.optim.multipliers = {"backbone.body": 0.1}
    experiment.loader.batch_size = 6
    experiment.run.epochs, experiment.run.evaluate_epochs = 10, 1
    return experiment


def _documents(make: Callable[[], DriveExperiment]) -> DriveExperiment:
    """Takes the documents' size: 900×1600, strides 8 to 64."""
    experiment = make()
    experiment.data.image_size, experiment.data.resize = (900, 1600), (1.0, 1.0)
    experiment.model.backbone.strides = (8, 16, 32, 64)
    experiment.loader.batch_size = 1
    return experiment


def _tiny(make: Callable[[], DriveExperiment]) -> DriveExperiment:
    """Takes smaller numbers for the same code: minutes on two cores, and it learns. Its weights are random."""
    experiment = make()
    data, optim, run, with_motion = experiment.data, experiment.optim, experiment.run, experiment.model.head.with_motion
    experiment.model = tiny()
    experiment.model.head.with_motion = with_motion
    data.image_size, data.resize, data.rotation = (96, 160), (1.0, 1.0), 0.0
    optim.lr, optim.base_batch, optim.multipliers = 2e-3, 0, {"backbone.body": 1.0}
    experiment.schedule.warmup_steps = 20
    experiment.loader.batch_size, experiment.loader.workers = 2, 0
    run.epochs, run.evaluate_epochs, run.log_steps, run.amp = 24, 8, 20, "float32"
    return experiment


_FULL: dict[str, Callable[[], DriveExperiment]] = {
    make.__name__: make for make in (sparsedrive_small_stage1, sparsedrive_small_stage2)
}
_FULL |= {f"{name}_900x1600": partial(_documents, make) for name, make in list(_FULL.items())}
EXPERIMENTS: dict[str, Callable[[], DriveExperiment]] = dict(_FULL)
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in _FULL.items()}
