"""The completion cascade as an experiment (system A up to the features; a driving head comes on top of them)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
import torch.distributed as dist

from ....modules.completion.cascade import CascadeConfig, CompletionCascade
from ....modules.rig import NUSCENES_CAMERAS
from ....modules.settings import Count
from ...command_line import nearest
from ...config import Experiment
from ...data.windows import WindowBatch, WindowConfig, Windows, build_windows, collate
from .baselines import random_features, training_mean
from .evaluate import BASELINES, WARP_DEPTHS, Scenario, evaluate_completion


@dataclass
class CompletionExperiment(Experiment):
    """The cascade with its data, losses and evaluation."""

    model: CascadeConfig = field(default_factory=CascadeConfig)
    data: WindowConfig = field(default_factory=WindowConfig)
    losses: dict[str, float] = field(
        default_factory=lambda: dict(ssl=1.0, vae_rec=1.0, vae_kl=0.001, planning_guided=0.5)
    )
    metric: str = "relative_l2"
    evaluate_without: tuple[str, ...] = NUSCENES_CAMERAS  # cameras that are dropped, one after another
    constant_samples: Count = 256  # training samples whose mean is the constant that completion is judged by

    def validate(self) -> None:
        """ValueError for a camera that no rig of nuScenes has."""
        for camera in self.evaluate_without:
            if camera not in NUSCENES_CAMERAS:
                raise ValueError(f"evaluate_without has {camera!r}{nearest(camera, NUSCENES_CAMERAS)}")

    def build_model(self) -> CompletionCascade:
        return self.model.build()

    def remarks(self, model: CompletionCascade) -> list[str]:
        """That the features mean nothing, where the backbone is random and frozen."""
        trained = any(parameter.requires_grad for parameter in model.backbone.parameters())
        return [] if trained else random_features(model)

    def build_data(self):
        return build_windows(self.data, self.run.seed)

    def collate(self, items: Sequence[WindowBatch]) -> WindowBatch:
        return collate(items)

    def evaluate(self, model: CompletionCascade, loader) -> dict[str, float]:
        """Measures how far completed features are from the true ones, each camera of `evaluate_without` dropped in
        turn.

        `relative_l2`: ‖completed − true‖ / ‖true‖ over the absent camera's cells, mean over cameras and scales;
        `explained`: the share of the variance about the constant, likewise. `relative_l2/CAMERA`, `explained/CAMERA`
        and `explained/STRIDE` are means over the rest; `relative_l2_METHOD` is that of a baseline (see `evaluate`).
        """
        which = [Scenario(camera, (camera,)) for camera in self.evaluate_without]
        scores = evaluate_completion(model, loader, which, WARP_DEPTHS, self._constant(model))

        def mean(figure, method="completed", **where):
            found = (s for s in scores if s.method == method and all(getattr(s, k) == v for k, v in where.items()))
            return fmean(getattr(score, figure) for score in found)

        figures = dict(relative_l2=mean("relative_l2"), explained=mean("explained"))
        figures |= {f"relative_l2_{method}": mean("relative_l2", method) for method in BASELINES}
        for name in ("relative_l2", "explained"):
            figures |= {f"{name}/{camera}": mean(name, scenario=camera) for camera in self.evaluate_without}
        return figures | {f"explained/{stride}": mean("explained", stride=stride) for stride in model.backbone.strides}

    def figure_names(self) -> tuple[str, ...]:
        """The names of `evaluate`'s figures."""
        by = (*self.evaluate_without, *map(str, self.model.backbone.strides))
        split = [f"relative_l2/{camera}" for camera in self.evaluate_without] + [f"explained/{part}" for part in by]
        return ("relative_l2", "explained", *(f"relative_l2_{method}" for method in BASELINES), *split)

    def constant(self, model: CompletionCascade) -> list[torch.Tensor]:
        """The mean of each camera's features over training samples without augmentation, see `training_mean`."""
        config = replace(self.data, history=0)
        training = Windows(self.build_data()[0].drives, config, training=False)
        stride = -(-len(training) // self.constant_samples)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        chosen = range(0, len(training), stride)[rank::ranks] or range(1)  # no rank may stay away from the sum
        device = next(model.parameters()).device
        batches = (collate([training[0, index]]).to(device).images[:, -1] for index in chosen)
        return training_mean(model, batches)

    def _constant(self, model):
        """The same; that of a frozen backbone is measured once."""
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            return self.constant(model)
        of, maps = getattr(self, "_measured", (None, None))
        if of is not model:
            maps = self.constant(model)
            self._measured = (model, maps)
        return maps

    def record_sections(self, runs, folder, options) -> list[str]:
        """See `train.record`."""
        from .record import sections  # matplotlib takes a second

        return sections(runs, folder, options)
