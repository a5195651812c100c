"""Completion of missing cameras: V1 and V2 at the documents' size and at upstream's, ablations, and a tiny one of each.

Trained on completion losses alone, so the backbone stays frozen; give it weights where they exist
(`model.backbone.weights=CKPT`): those of others as `train/tools/import_checkpoint.py` makes them, or of a run here.
"""

from collections.abc import Callable
from functools import partial

from .experiment import CompletionExperiment


def completion_v2() -> CompletionExperiment:
    """The documents' V2: 900×1600, ResNet-50, a missing camera attends to itself and its neighbours.

    Stage 3 is left out, since it changes nothing that could be measured; `completion_v2_documents` has all of theirs.
    """
    experiment = CompletionExperiment()
    experiment.model.temporal.topology = "neighbours"
    experiment.model.planning.enable = False
    experiment.model.dropout.ramp_steps = 5000
    experiment.optim.freeze = ("backbone",)
    experiment.optim.multipliers = {"temporal.offset": 0.02}  # at full rate the offsets wander and blur the warp
    experiment.run.amp = "bfloat16"
    return experiment


def completion_v1() -> CompletionExperiment:
    """V1 attends to all cameras; nothing else differs."""
    experiment = completion_v2()
    experiment.model.temporal.topology = "global"
    return experiment


def completion_own() -> CompletionExperiment:
    """A missing camera attends to its own past only."""
    experiment = completion_v2()
    experiment.model.temporal.topology = "own"
    return experiment


def completion_v2_no_temporal() -> CompletionExperiment:
    """Without stage 1."""
    experiment = completion_v2()
    experiment.model.temporal.enable = False
    experiment.optim.multipliers = {}
    return experiment


def completion_v2_no_vae() -> CompletionExperiment:
    """Without stage 2."""
    experiment = completion_v2()
    experiment.model.vae.enable = False
    return experiment


def completion_v2_planning() -> CompletionExperiment:
    """With stage 3, guided in training by the trajectory that was driven."""
    experiment = completion_v2()
    experiment.model.planning.enable = True
    return experiment


def completion_v2_documents() -> CompletionExperiment:
    """All three stages, the second in training alone, as the documents have them."""
    experiment = completion_v2_planning()
    experiment.model.vae.at_inference = False
    return experiment


def completion_v2_kv8() -> CompletionExperiment:
    """Attends to a quarter of the keys."""
    experiment = completion_v2()
    experiment.model.temporal.kv_downsample = 8
    return experiment


def completion_v2_queue1() -> CompletionExperiment:
    """Has one moment of history."""
    experiment = completion_v2()
    experiment.model.temporal.queue_length = experiment.data.history = 1
    return experiment


def completion_v2_far() -> CompletionExperiment:
    """Adds a third depth hypothesis, for what is too far to move."""
    experiment = completion_v2()
    experiment.model.temporal.depths = (10.0, 30.0, 200.0)
    return experiment


def completion_v2_predicted() -> CompletionExperiment:
    """Stage 3 is guided by the motion since the last moment, which inference has too."""
    experiment = completion_v2_planning()
    experiment.model.planning.trajectory_source = "predicted"
    return experiment


def completion_v2_unguided() -> CompletionExperiment:
    """Stage 3 has no trajectory."""
    experiment = completion_v2_planning()
    experiment.model.planning.trajectory_source = "none"
    return experiment


def completion_v2_parallel() -> CompletionExperiment:
    """The three stages side by side, joined by a predicted confidence."""
    experiment = completion_v2_planning()
    experiment.model.parallel = True
    return experiment


def completion_v3_consistent() -> CompletionExperiment:
    """A completion is held to the one of the moment before."""
    experiment = completion_v3()
    experiment.model.consistency = True
    experiment.losses["temporal"] = 0.1
    return experiment


def completion_v3() -> CompletionExperiment:
    """V3: geometry first, at every scale. Stage 1 fills what has no history too, and stages 2 and 3 are left out."""
    experiment = completion_v2()
    temporal = experiment.model.temporal
    temporal.geometry, temporal.depths = True, (3.5, 6.0, 10.0, 17.0, 35.0, 200.0)
    experiment.model.vae.enable = False
    experiment.losses = dict(ssl=1.0)
    experiment.optim.multipliers = {}
    return experiment


def completion_v3_int8() -> CompletionExperiment:
    """Keeps its history at the resolution of keys, in whole numbers."""
    experiment = completion_v3()
    temporal = experiment.model.temporal
    temporal.history_pool, temporal.history_dtype = temporal.kv_downsample, "int8"
    return experiment


def _upstream(make: Callable[[], CompletionExperiment]) -> CompletionExperiment:
    """Takes the size of SparseDrive's released model: 256×704, strides 4 to 32."""
    experiment = make()
    experiment.data.image_size = (256, 704)
    experiment.data.resize = (1.0, 1.25)
    experiment.model.backbone.strides = (4, 8, 16, 32)
    experiment.loader.batch_size = 6
    return experiment


def _tiny(make: Callable[[], CompletionExperiment]) -> CompletionExperiment:
    """Takes smaller numbers for the same code: a few steps in seconds on two cores, and it learns."""
    experiment = make()
    model, data, run = experiment.model, experiment.data, experiment.run
    data.image_size, data.history, data.resize = (96, 160), min(data.history, 2), (1.0, 1.0)
    data.scenes, data.future = (6, 2), 6
    model.channels, model.backbone.resnet, model.backbone.strides = 64, "tiny", (8, 16)
    model.temporal.stride, model.temporal.kv_downsample = 16, max(1, model.temporal.kv_downsample // 4)
    model.temporal.heads = model.planning.heads = 4
    if not model.temporal.geometry:
        model.temporal.depths = (10.0, 30.0, 200.0)  # at this size most of what is seen is too far to move
    model.temporal.grid = model.vae.grid = (12, 20)
    model.temporal.history_pool = min(model.temporal.history_pool, model.temporal.kv_downsample)
    model.dropout.p_missing, model.dropout.ramp_steps = 1.0, 0
    model.temporal.queue_length = data.history
    model.planning.kv_downsample, model.planning.sigma, model.vae.latent = 2, 16.0, 16
    experiment.optim.lr, experiment.schedule.warmup_steps = 5e-3, 20
    experiment.loader.batch_size, experiment.loader.workers = 4, 0
    run.epochs, run.evaluate_epochs, run.log_steps, run.amp = 18, 6, 10, "float32"
    return experiment


_FULL = (
    completion_v1,
    completion_v2,
    completion_own,
    completion_v2_no_temporal,
    completion_v2_no_vae,
    completion_v2_planning,
    completion_v2_documents,
    completion_v2_kv8,
    completion_v2_queue1,
    completion_v2_far,
    completion_v2_predicted,
    completion_v2_unguided,
    completion_v2_parallel,
    completion_v3,
    completion_v3_int8,
    completion_v3_consistent,
)
EXPERIMENTS: dict[str, Callable[[], CompletionExperiment]] = {make.__name__: make for make in _FULL}
EXPERIMENTS |= {f"{make.__name__}_256x704": partial(_upstream, make) for make in (completion_v1, completion_v2)}
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in EXPERIMENTS.items()}
