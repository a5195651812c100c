"""The completion cascade as an experiment (system A up to the features; a driving head comes on top of them)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ....modules.completion.cascade import CascadeConfig, CompletionCascade
from ...config import Experiment
from ...data.windows import WindowBatch, WindowConfig, build_windows, collate
from .evaluate import Scenario, evaluate_completion


@dataclass
class CompletionExperiment(Experiment):
    """The cascade with its data, losses and evaluation."""

    model: CascadeConfig = field(default_factory=CascadeConfig)
    data: WindowConfig = field(default_factory=WindowConfig)
    losses: dict[str, float] = field(
        default_factory=lambda: dict(ssl=1.0, vae_rec=1.0, vae_kl=0.001, planning_guided=0.5)
    )
    metric: str = "relative_l2"
    evaluate_without: tuple[str, ...] = ("CAM_FRONT", "CAM_BACK_LEFT")  # cameras that are dropped, one after another

    def build_model(self) -> CompletionCascade:
        return self.model.build()

    def build_data(self):
        return build_windows(self.data, self.run.seed)

    def collate(self, items: Sequence[WindowBatch]) -> WindowBatch:
        return collate(items)

    def evaluate(self, model: CompletionCascade, loader) -> dict[str, float]:
        """Measures how far completed features are from the true ones, each camera of `evaluate_without` dropped in
        turn.

        `relative_l2`: ‖completed − true‖ / ‖true‖ over the absent camera's cells, mean over cameras and scales;
        `relative_l2/CAMERA` by camera; `relative_l2_none` and `relative_l2_warp` for what the backbone makes of a black
        image, and for the camera's own past moved to the present (see `evaluate`).
        """
        which = [Scenario(camera, (camera,)) for camera in self.evaluate_without]
        scores = evaluate_completion(model, loader, which, self.model.temporal.depths)

        def mean(method, cameras=self.evaluate_without):
            return fmean(s.relative_l2 for s in scores if s.method == method and s.scenario in cameras)

        means = dict(relative_l2=mean("completed"), relative_l2_none=mean("none"), relative_l2_warp=mean("warp"))
        return means | {f"relative_l2/{camera}": mean("completed", (camera,)) for camera in self.evaluate_without}

    def record_sections(self, runs, folder, options) -> list[str]:
        """See `train.record`."""
        from .record import sections  # matplotlib takes a second

        return sections(runs, folder, options)
