"""The sparse driving model: stages 1 and 2 at upstream's size and at the documents', and a tiny one of each.

Stage 1 learns detection and map; stage 2 begins with its weights (`--weights CKPT`) and learns motion and planning too.
Those that end in `_upstream` begin with, or evaluate, released weights of SparseDrive.
Anchors come from the training split by train/tools/make_anchors.py (`anchors=FILE`).
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from ....modules.sparse_drive.completed import CompletedDriveConfig
from ....modules.sparse_drive.head import as_upstream
from ....modules.sparse_drive.network import tiny
from .experiment import CompletedExperiment, DriveExperiment


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


def sparsedrive_small_stage2_v2() -> CompletedExperiment:
    """Completion V2 in front, from the weights of stage 2: the backbone is frozen, the head learns slowly."""
    experiment = _completed(sparsedrive_small_stage2())
    experiment.model.temporal.topology = "neighbours"
    experiment.model.planning.enable = False  # changes nothing in completion_v2
    experiment.optim.multipliers = {"temporal.offset": 0.02, "head": 0.1, "depth": 0.1}
    return experiment


def sparsedrive_small_stage2_v1() -> CompletedExperiment:
    """V1: a missing camera attends to all cameras; nothing else differs."""
    experiment = sparsedrive_small_stage2_v2()
    experiment.model.temporal.topology = "global"
    return experiment


def sparsedrive_small_stage2_v3() -> CompletedExperiment:
    """V3: geometry first, at every scale; stage 2 is left out too."""
    experiment = sparsedrive_small_stage2_v2()
    model = experiment.model
    model.temporal.geometry, model.temporal.depths = True, (3.5, 6.0, 10.0, 17.0, 35.0, 200.0)
    model.vae.enable = False
    experiment.optim.multipliers = {"head": 0.1, "depth": 0.1}
    return experiment


def _completed(base: DriveExperiment) -> CompletedExperiment:
    """The same with completion in front: a longer history, cameras that go missing more and more often."""
    model = CompletedDriveConfig(base.model.backbone, base.model.head, base.model.depth)
    model.dropout.ramp_steps = 5000
    model.planning.trajectory_source = "none"  # the way that was driven makes plans worse
    shared = {f.name: getattr(base, f.name) for f in fields(DriveExperiment) if f.name not in ("model", "losses")}
    experiment = CompletedExperiment(model=model, **shared)
    experiment.data.history = model.temporal.queue_length = 2  # inference remembers as much as training
    experiment.optim.freeze = ("backbone",)
    return experiment


def _upstream(make: Callable[[], DriveExperiment]) -> DriveExperiment:
    """Takes every option as SparseDrive's own code has it, and its frame: what its released weights need, see
    train/tools/import_checkpoint.py. Cameras need no order of theirs: the head finds them by name and projection."""
    experiment = make()
    as_upstream(experiment.model.head)
    experiment.data.frame = "lidar"
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
    small = tiny()
    small.head.with_motion = with_motion
    if data.frame == "lidar":
        as_upstream(small.head)
    experiment.model.backbone, experiment.model.head, experiment.model.depth = small.backbone, small.head, small.depth
    if isinstance(experiment.model, CompletedDriveConfig):
        _tiny_completion(experiment.model)
    data.image_size, data.resize, data.rotation = (96, 160), (1.0, 1.0), 0.0
    data.box_distance = 30.0  # beyond it an object has a few pixels at this size
    experiment.results.apart = 2.0  # so few layers leave several boxes to an object
    optim.lr, optim.base_batch = 2e-3, 0
    optim.multipliers = {name: 1.0 if name == "backbone.body" else factor for name, factor in optim.multipliers.items()}
    experiment.schedule.warmup_steps = 20
    experiment.loader.batch_size, experiment.loader.workers = 2, 0
    # Many towns seen a few times teach more than a few seen often, which are learned by heart.
    run.epochs = run.evaluate_epochs = 2 if with_motion else 5
    run.log_steps, run.amp = 20, "float32"
    return experiment


def _tiny_completion(model: CompletedDriveConfig) -> None:
    model.temporal.stride, model.temporal.kv_downsample = 16, 1
    model.temporal.heads = model.planning.heads = 4
    if not model.temporal.geometry:
        model.temporal.depths = (10.0, 30.0, 200.0)  # at this size most of what is seen is too far to move
    model.temporal.grid = model.vae.grid = (6, 10)
    model.planning.kv_downsample, model.planning.sigma, model.vae.latent = 2, 16.0, 16
    model.dropout.p_missing, model.dropout.ramp_steps = 1.0, 0


_FULL: dict[str, Callable[[], DriveExperiment]] = {
    make.__name__: make
    for make in (
        sparsedrive_small_stage1,
        sparsedrive_small_stage2,
        sparsedrive_small_stage2_v1,
        sparsedrive_small_stage2_v2,
        sparsedrive_small_stage2_v3,
    )
}
_UPSTREAM = {f"{name}_upstream": partial(_upstream, make) for name, make in _FULL.items() if "stage2" in name}
_FULL |= {f"{name}_900x1600": partial(_documents, make) for name, make in list(_FULL.items())} | _UPSTREAM
EXPERIMENTS: dict[str, Callable[[], DriveExperiment]] = dict(_FULL)
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in _FULL.items()}
