"""How near completed features come to those of the absent images: by camera, by pair of neighbours, by lost moments.

For every window the backbone runs once; each scenario then replaces the absent cameras' features by those of a black
image and asks each method to restore them. The methods are `BASELINES` and the trained cascade itself:

none       the black image's features: what a network sees that completes nothing
zeros      zeros
constant   the camera's mean over the training samples, cell by cell (`training_mean`)
copy       the camera's own last features; those of `none` where it has none
warp       the same, moved to the present at the depth hypotheses
completed  the cascade
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ....kernels import trajectory_importance
from ....modules.completion.cascade import CompletionCascade
from ....modules.completion.planning_guided import project_trajectory
from ....modules.rig import RigFrame
from ....modules.topology import Topology
from ....modules.window import RigWindow
from ...distributed import sum_over_ranks
from .baselines import warp_rig

BASELINES = ("none", "zeros", "constant", "copy", "warp")
LOST = (1, 3, 10)  # moments
WARP_DEPTHS = (10.0, 30.0, 200.0)  # metres, of the baseline `warp` of records and tables, whatever a model warps at
CORRIDOR = 0.5  # cells whose trajectory importance is above this belong to the ego corridor
CORRIDOR_WIDTH = 64.0  # sigma of that importance, image pixels


@dataclass(frozen=True)
class Scenario:
    """What is lost. The cameras are absent now and were so in the last `lost` moments, however few a window has; with
    `history` False nobody was there before, as at the start of a drive."""

    name: str
    cameras: tuple[str, ...]
    lost: int = 0
    history: bool = True


@dataclass(frozen=True)
class Score:
    """One method in one scenario at one stride. NaN: the corridor's figures where no absent camera sees the path, and
    `explained` without a constant."""

    scenario: str
    method: str
    stride: int
    relative_l2: float  # ‖completed − true‖ / ‖true‖ over the absent cameras' cells
    explained: float  # share of the variance about the constant: 1 − ‖completed − true‖² / ‖constant − true‖²
    cosine: float  # mean over the cells
    corridor_relative_l2: float
    corridor_explained: float
    corridor_cosine: float


@dataclass(frozen=True, eq=False)
class SeenWindow:
    """What the backbone makes of a window: the input of every method."""

    moments: list[list[torch.Tensor]]  # for each moment, oldest first, for each scale (B, V, C, h, w)
    black: list[torch.Tensor]  # of a black image, for each scale (1, 1, C, h, w)
    frames: list[RigFrame]  # of the moments
    trajectory: torch.Tensor  # (B, F, 2) metres, the ego's future


def scenarios(cameras: Sequence[str], history: int) -> list[Scenario]:
    """Makes the scenarios: each camera alone, each pair of neighbours, then each camera lost for the number of moments
    in `LOST` that are shorter than `history`, lost from the start (all that is longer), and without any history."""
    singles = [Scenario(name, (name,)) for name in cameras]
    neighbours = Topology.named("neighbours", cameras).attends
    pairs = [(a, b) for i, a in enumerate(cameras) for b in cameras[i + 1 :] if b in neighbours[a]]
    doubles = [Scenario(f"{a} + {b}", (a, b)) for a, b in pairs]
    durations = {f"{count} moments lost".replace("1 moments", "1 moment"): count for count in LOST if count < history}
    durations["lost from the start"] = history
    lost = [Scenario(f"{name}, {words}", (name,), count) for words, count in durations.items() for name in cameras]
    alone = [Scenario(f"{name}, no history", (name,), history=False) for name in cameras]
    return [*singles, *doubles, *lost, *alone]


class _Sums:
    """Running sums of one (scenario, method, stride): all cells, then the corridor's."""

    def __init__(self, device):
        self.values = torch.zeros(2, 4, dtype=torch.float64, device=device)  # error², true², cosines, cells

    def add(self, completed, true, corridor):
        """Adds cells: completed and true (Nq, C, H, W), corridor (Nq, H, W) bool."""
        completed, true = completed.float(), true.float()
        cells = torch.stack(
            [
                (completed - true).square().sum(1),
                true.square().sum(1),
                F.cosine_similarity(completed, true, dim=1),
                torch.ones_like(true[:, 0]),
            ]
        ).double()
        self.values[0] += cells.sum((1, 2, 3))
        self.values[1] += (cells * corridor).sum((1, 2, 3))

    def figures(self, constant: "_Sums | None") -> list[float]:
        """Relative L2 error, variance explained about the constant and cosine of all cells, then of the corridor's."""
        error, true, cosine, count = self.values.unbind(1)
        of_constant = torch.full_like(error, torch.nan) if constant is None else constant.values[:, 0]
        figures = (error / true).sqrt(), 1 - error / of_constant, cosine / count
        return torch.stack(figures, dim=1).flatten().tolist()


@torch.no_grad()
def look(model: CompletionCascade, window: RigWindow) -> SeenWindow:
    """Runs the backbone over a window on the model's device, the model being in evaluation."""
    moments = [model.extract(images) for images in window.images.unbind(1)]
    black = model.extract(torch.zeros_like(window.images[:1, -1, :1]))
    return SeenWindow(moments, black, window.frames, window.trajectory)


@torch.no_grad()
def evaluate_completion(
    model: CompletionCascade,
    windows: Iterable[RigWindow | SeenWindow],
    which: Sequence[Scenario],
    depths: Sequence[float] = (10.0, 30.0),
    constant: Sequence[torch.Tensor] | None = None,
) -> list[Score]:
    """Scores every scenario, for the baselines and for the model (method "completed"), summed over all ranks.

    Args:
        model: put into evaluation: no trajectory but one that it predicts itself.
        windows: on the model's device.
        which: the scenarios.
        depths: metres, of the baseline `warp`.
        constant: for each scale (V, C, h, w), see `training_mean`; None = that baseline is left out.
    """
    model.eval()
    device = next(model.parameters()).device
    strides = model.backbone.strides
    methods = [name for name in (*BASELINES, "completed") if name != "constant" or constant is not None]
    sums = {(s, method, stride): _Sums(device) for s in which for method in methods for stride in strides}
    for window in windows:
        seen = look(model, window) if isinstance(window, RigWindow) else window
        corridors = [_corridor(seen, stride, x) for stride, x in zip(strides, seen.moments[-1])]
        for scenario in which:
            missing = _missing(scenario, model.dropout.cameras, seen)
            restored = _baselines(seen, missing, scenario, strides, depths)
            if constant is not None:
                restored["constant"] = [usual.expand_as(x) for usual, x in zip(constant, seen.moments[-1])]
            restored["completed"] = _completed(model, seen, missing, scenario, restored["none"])
            for method, features in restored.items():
                for stride, x, true, corridor in zip(strides, features, seen.moments[-1], corridors):
                    sums[scenario, method, stride].add(x[missing], true[missing], corridor[missing])
    for total in sums.values():
        total.values = sum_over_ranks(total.values)
    return [
        Score(s.name, method, stride, *total.figures(sums.get((s, "constant", stride))))
        for (s, method, stride), total in sums.items()
    ]


def _missing(scenario, cameras, seen):
    """The absent cameras, (B, V) bool."""
    present = seen.moments[-1][0]
    absent = torch.tensor([name in scenario.cameras for name in cameras], device=present.device)
    return absent.expand(len(present), -1)


def _steps(scenario, seen):
    """How many earlier moments a window has, and how many of them still had the absent cameras."""
    steps = len(seen.moments) - 1 if scenario.history else 0
    return steps, max(steps - scenario.lost, 0)


def _baselines(seen, missing, scenario, strides, depths):
    """What each baseline but the constant makes of the present: for each stride (B, V, C, H, W)."""
    absent = missing[:, :, None, None, None]
    original = [torch.where(absent, dark, x) for dark, x in zip(seen.black, seen.moments[-1])]
    restored = dict(none=original, zeros=[x.masked_fill(absent, 0) for x in original], copy=original, warp=original)
    _, usable = _steps(scenario, seen)
    if usable:
        last, then, now = seen.moments[usable - 1], seen.frames[usable - 1], seen.frames[-1]
        moved = [warp_rig(old, then, now, stride, depths) for old, stride in zip(last, strides)]
        restored["copy"] = [torch.where(absent, old, x) for old, x in zip(last, original)]
        restored["warp"] = [torch.where(absent, old, x) for old, x in zip(moved, original)]
    return restored


def _completed(model, seen, missing, scenario, original):
    """What the cascade makes of it."""
    steps, usable = _steps(scenario, seen)
    trajectory = model.guidance(seen.frames[-2:] if steps else seen.frames[-1:])
    if model.temporal is None:
        return model.complete(original, missing, seen.frames[-1], trajectory=trajectory)[0]
    history = model.temporal.new_history()
    for step, (moment, frame) in enumerate(zip(seen.moments[:steps], seen.frames)):
        gone = missing if step >= usable else torch.zeros_like(missing)
        history.push(model.for_temporal(moment), gone, frame)
    return model.complete(original, missing, seen.frames[-1], history, trajectory=trajectory)[0]


def _corridor(seen, stride, features):
    """The cells near the ego's path, (B, V, H, W) bool."""
    points, valid = project_trajectory(seen.trajectory.cpu(), seen.frames[-1], stride)
    device, size = features.device, features.shape[-2:]
    near = trajectory_importance(
        points.flatten(0, 1).to(device), valid.flatten(0, 1).to(device), size, sigma=CORRIDOR_WIDTH / stride
    )
    return near.unflatten(0, points.shape[:2]) > CORRIDOR
