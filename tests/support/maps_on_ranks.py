"""What test_ranks of the map system looks at: training on two ranks with the frozen model whole, and sharded."""

from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from rigfuse.train.config import apply_options
from rigfuse.train.systems.map_qformer.configs import EXPERIMENTS
from rigfuse.train.systems.map_qformer.data import MapSamples
from rigfuse.train.systems.map_qformer.experiment import MapExperiment
from rigfuse.train.systems.map_qformer.first_step import made_up_batch
from rigfuse.train.trainer import Trainer

OPTIONS = (
    "data.image_size=36,64", "model.images.channels=16", "model.qformer.width=32", "model.qformer.heads=2",
    "model.qformer.layers=2", "model.qformer.hidden=32", "model.qformer.grid=1,2", "model.lm.width=32",
    "model.lm.layers=2", "model.lm.hidden=32", "model.lm.checkpoint=true", "model.instances=6", "model.points=5",
    "model.decoder.reduce=32,", "model.images.backbone.norm_eval=true", "loader.batch_size=1", "run.epochs=2",
    "run.evaluate_epochs=2", "run.log_steps=1", "run.tensorboard=false", "run.keep=50",
)  # fmt: skip


class MadeUpSamples:
    """Noise and lines, a few samples."""

    share = MapSamples.share

    def __init__(self, settings, length):
        self._settings, self._length = settings, length

    def __len__(self):
        return self._length

    def __getitem__(self, key):
        torch.manual_seed(key[1])
        return replace(made_up_batch(self._settings), tokens=[f"made-up-{key[1]}"])


@dataclass
class MadeUpExperiment(MapExperiment):
    def build_data(self):
        return MadeUpSamples(self, 3), MadeUpSamples(self, 3)


def train_on_ranks(world, folder):
    """Two epochs of one step with the frozen model whole on each rank; the same sharded; this resumed after the first
    step; each rank writes what it has."""

    def fit(name, *more, resume=None):
        made = EXPERIMENTS["map_qformer_stage2_tiny"]()
        settings = apply_options(MadeUpExperiment(**vars(made)), [*OPTIONS, *more])
        trainer = Trainer(settings, folder / name, world, resume=resume)
        figures = trainer.fit()
        weights = list(trainer.model.language.model.parameters())
        local = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights)
        seen = dict(figures=figures, local=local, total=sum(w.numel() for w in weights))
        torch.save(seen | dict(model=trainer.model.state_dict()), folder / f"{name}-{world.rank}.pt")

    fit("whole")
    fit("sharded", "model.lm.shard=true")
    fit("resumed", "model.lm.shard=true", resume=folder / "sharded" / "checkpoints" / "step-00000001.pt")
