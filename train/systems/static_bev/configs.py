"""Static BEV in two steps, at the documents' sizes and tiny.

Step 1 learns without time. Step 2 begins with its checkpoint (`model.weights`), keeps all that sees the ground frozen
and learns to fuse; so what is frozen can be computed once (`data.cache`). nuScenes' key frames are half a second apart:
`model.history.intervals=0.5,2.0,3.5` is what they can match.
"""

from collections.abc import Callable
from functools import partial

from ....modules.static_bev.grid import GridConfig
from ....modules.static_bev.network import NUSCENES_GROUPS
from .experiment import WEIGHTS, StaticBevExperiment

STEPS = 75_000  # of step 2 in the documents
_STEP1 = 0.67  # of the static losses, which share step 1 with other tasks in the documents


def static_bev_step1() -> StaticBevExperiment:
    """Without time: cameras in four groups with a ResNet-34 each, 56 × 104 cells of 0.8 m, labels of 0.2 m."""
    experiment = StaticBevExperiment()
    optim, schedule = experiment.optim, experiment.schedule
    experiment.model.fusion.kind = "off"
    experiment.losses = {name: _STEP1 * weight for name, weight in WEIGHTS.items()}
    optim.lr, optim.base_batch, optim.batch_rule = 2e-4, 128, "sqrt"  # 8 GPUs with 16 samples each
    optim.weight_decay, optim.decay = 0.01, "matrices"
    schedule.kind, schedule.milestones, schedule.gamma = "multistep", (0.65, 0.9), 0.1
    experiment.loader.batch_size, experiment.run.amp = 16, "bfloat16"
    experiment.evaluation.pictures, experiment.evaluation.picture_steps = 4, 1000
    return experiment


def static_bev_step2() -> StaticBevExperiment:
    """With time: features of 0.7, 1.9 and 3.3 s ago, concatenated; only fusion and head learn."""
    experiment = static_bev_step1()
    experiment.model.fusion.kind = "concat"
    experiment.model.weights = "work_dirs/static_bev_step1/checkpoints/best.pt"
    experiment.losses = dict(WEIGHTS)
    experiment.optim.freeze_until = {"cameras": STEPS, "view": STEPS}
    return experiment


def _tiny(make: Callable[[], StaticBevExperiment]) -> StaticBevExperiment:
    """Takes smaller numbers for the same code: the ground near the car, a small backbone for all cameras, few channels.

    Pictures are 320 pixels wide without their sky: in half of that, paint is thinner than a cell of the maps. Features
    have the labels' cells, so that a line of the past keeps its place as it is moved; the head looks at four scales.
    The past is young enough for drives of three seconds, ten moments in each, and old enough for a car at 5 m/s to have
    seen the ground that it stands on.
    """
    experiment = make()
    model, data, run = experiment.model, experiment.data, experiment.run
    model.grid = GridConfig((-8.0, 20.0), (-12.0, 12.0), cell=0.25, upsample=1)
    model.groups = {"all": tuple(name for names in NUSCENES_GROUPS.values() for name in names)}
    model.backbone.resnet, model.backbone.strides = "tiny", (4, 8, 16, 32)
    model.view.heights, model.view.places, model.view.heads = (0.0,), 1, 4
    model.image_channels, model.channels = 32, 32
    model.head.channels, model.head.layers, model.head.scales = 32, 1, 4
    model.history.intervals = (0.5, 1.0, 2.0)
    model.fusion.mode = "bilinear"
    data.image_size, data.shift, data.p_lost, data.remember = (96, 320), False, 0.25, 3000
    experiment.optim.lr, experiment.optim.base_batch, experiment.schedule.warmup_steps = 3e-3, 0, 20
    experiment.schedule.kind = "cosine"
    experiment.losses.update(lane_focal=0.5, lane_dice=2.0, road_focal=0.5, road_dice=0.5, heat=0.2, box=0.02)
    experiment.loader.batch_size, experiment.loader.workers = 4, 0
    experiment.evaluation.pictures = experiment.evaluation.picture_steps = 0
    experiment.evaluation.every = 4
    run.epochs, run.evaluate_epochs, run.log_steps, run.amp = 2, 2, 50, "float32"
    if model.weights:
        model.weights = "work_dirs/static_bev_step1_tiny/checkpoints/best.pt"
        experiment.losses.update(lane_focal=0.1, lane_dice=5.0)  # Dice asks for sure lines, as series evaluation does
        run.epochs = run.evaluate_epochs = 1
    return experiment


_FULL = {"static_bev_step1": static_bev_step1, "static_bev_step2": static_bev_step2}
EXPERIMENTS: dict[str, Callable[[], StaticBevExperiment]] = _FULL | {
    f"{name}_tiny": partial(_tiny, make) for name, make in _FULL.items()
}
