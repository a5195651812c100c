"""How near completed features come to those of the absent images: by camera, by pair of neighbours, by lost moments.

For every window the backbone runs once; each scenario then replaces the absent cameras' features by those of a black
image and asks each method to restore them. Methods: `none` (the black image's features), `copy` (the camera's own last
features), `warp` (the same, moved to the present at the depth hypotheses), and the trained cascade itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ....kernels import multi_depth_warp, trajectory_importance
from ....modules.completion.cascade import CompletionCascade, RigWindow
from ....modules.completion.planning_guided import project_trajectory
from ....modules.rig import RigFrame, relative_projection
from ....modules.topology import Topology
from ...distributed import sum_over_ranks

BASELINES = ("none", "copy", "warp")
CORRIDOR = 0.5  # cells whose trajectory importance is above this belong to the ego corridor
CORRIDOR_WIDTH = 64.0  # sigma of that importance, image pixels


@dataclass(frozen=True)
class Scenario:
    """What is lost. The cameras are absent now and were so in the last `lost` moments."""

    name: str
    cameras: tuple[str, ...]
    lost: int = 0


@dataclass(frozen=True)
class Score:
    """One method in one scenario at one stride. The corridor's figures are NaN where no absent camera sees the path."""

    scenario: str
    method: str
    stride: int
    relative_l2: float  # ‖completed − true‖ / ‖true‖ over the absent cameras' cells
    cosine: float  # mean over the cells
    corridor_relative_l2: float
    corridor_cosine: float


def scenarios(cameras: Sequence[str], history: int) -> list[Scenario]:
    """Makes the scenarios: each camera alone, each pair of neighbours, and the front and back cameras lost for 1 …
    `history` moments."""
    singles = [Scenario(name, (name,)) for name in cameras]
    neighbours = Topology.named("neighbours", cameras).attends
    pairs = [(a, b) for i, a in enumerate(cameras) for b in cameras[i + 1 :] if b in neighbours[a]]
    doubles = [Scenario(f"{a} + {b}", (a, b)) for a, b in pairs]
    lost = [
        Scenario(f"{name}, {count} moments lost", (name,), count)
        for name in ("CAM_FRONT", "CAM_BACK")
        for count in range(1, history + 1)
    ]
    return [*singles, *doubles, *lost]


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

    def figures(self) -> list[float]:
        """The relative L2 error and the cosine of all cells, then of the corridor's."""
        error, true, cosine, count = self.values.unbind(1)
        return torch.stack([(error / true).sqrt(), cosine / count], dim=1).flatten().tolist()


@torch.no_grad()
def evaluate_completion(
    model: CompletionCascade,
    windows: Iterable[RigWindow],
    which: Sequence[Scenario],
    depths: Sequence[float] = (10.0, 30.0),
) -> list[Score]:
    """Scores every scenario, for the baselines and for the model (method "completed"), summed over all ranks.

    Args:
        model: put into evaluation: no VAE, no trajectory.
        windows: on the model's device.
        which: the scenarios.
        depths: metres, of the baseline `warp`.
    """
    model.eval()
    device = next(model.parameters()).device
    strides = model.backbone.strides
    keys = [(s, method, stride) for s in which for method in (*BASELINES, "completed") for stride in strides]
    sums = {key: _Sums(device) for key in keys}
    for window in windows:
        moments = [model.extract(images) for images in window.images.unbind(1)]
        black = model.extract(torch.zeros_like(window.images[:1, -1]))
        corridors = [_corridor(window, stride, x.shape[-2:]) for stride, x in zip(strides, moments[-1])]
        for scenario in which:
            missing = _missing(scenario, model.dropout.cameras, window)
            for method, features in _restored(model, window, moments, black, missing, scenario, depths).items():
                for stride, x, true, corridor in zip(strides, features, moments[-1], corridors):
                    sums[scenario, method, stride].add(x[missing], true[missing], corridor[missing])
    for total in sums.values():
        total.values = sum_over_ranks(total.values)
    return [Score(s.name, method, stride, *sums[s, method, stride].figures()) for s, method, stride in keys]


def _missing(scenario, cameras, window):
    return torch.tensor([[name in scenario.cameras for name in cameras]], device=window.images.device).expand(
        len(window.images), -1
    )


def _restored(model, window, moments, black, missing, scenario, depths):
    """What each method makes of the present: for each stride (B, V, C, H, W)."""
    absent = missing[:, :, None, None, None]
    original = [torch.where(absent, dark, x) for dark, x in zip(black, moments[-1])]
    past = moments[: len(moments) - 1 - scenario.lost]  # those in which the absent cameras were there
    restored = dict(none=original, copy=original, warp=original)
    if past:
        last = len(past) - 1
        restored["copy"] = [torch.where(absent, old, x) for old, x in zip(past[-1], original)]
        then, now = window.frames[last], window.frames[-1]
        restored["warp"] = [
            torch.where(absent, warp_rig(old, then, now, stride, depths), x)
            for old, x, stride in zip(past[-1], original, model.backbone.strides)
        ]
    history, history_missing = [], None
    if model.temporal is not None:
        scale, steps = model.temporal_scale, len(moments) - 1
        gone = torch.stack([missing & (step >= steps - scenario.lost) for step in range(steps)]) if steps else None
        history = [
            torch.where(was_gone[:, :, None, None, None], black[scale], moment[scale])
            for moment, was_gone in zip(moments, gone if steps else ())
        ]
        history_missing = gone
    restored["completed"] = model.complete(original, history, missing, window.frames, history_missing=history_missing)[
        0
    ]
    return restored


def warp_rig(
    features: torch.Tensor, then: RigFrame, now: RigFrame, stride: int, depths: Sequence[float]
) -> torch.Tensor:
    """Moves every camera's earlier features (B, V, C, H, W) to the present: the mean over the depths that see any."""
    then_T_now = torch.linalg.solve(then.world_T_ego, now.world_T_ego)[:, None]
    projection = relative_projection(now.image_T_ego, then.image_T_ego, then_T_now, stride=stride)
    flat = features.flatten(0, 1)
    planes = torch.tensor(depths, dtype=torch.float32, device=flat.device)
    warped, coverage = multi_depth_warp(flat, projection.flatten(0, 1).to(flat.device), planes)
    return (warped / coverage[:, None].clamp(min=1e-3)).unflatten(0, features.shape[:2])


def _corridor(window, stride, size):
    """The cells near the ego's path, (B, V, H, W) bool."""
    points, valid = project_trajectory(window.trajectory.cpu(), window.frames[-1], stride)
    device = window.images.device
    near = trajectory_importance(
        points.flatten(0, 1).to(device), valid.flatten(0, 1).to(device), size, sigma=CORRIDOR_WIDTH / stride
    )
    return near.unflatten(0, points.shape[:2]) > CORRIDOR
