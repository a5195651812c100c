"""Where a missing camera may look: which maps, past and present, and at what places of them its cells lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..history import HistoryFrame
from ..maps import wanted_maps
from ..rig import RigFrame, cell_T_image

FAR_GROUND = 60.0  # metres; ground that is further away looks like what stands on it


@dataclass(frozen=True, eq=False)
class Sources:
    """The maps that each of N missing maps may look at, K for each. Tensors on the CPU, geometry in float64."""

    sample: torch.Tensor  # (N,) of each missing map
    camera: torch.Tensor  # (N,) of each missing map
    index: torch.Tensor  # (N, K) into `maps`, −1 = none
    maps: torch.Tensor  # (S,) moment · B·V + sample · V + camera, ascending; moment 0 is the present, 1 the newest past
    of: torch.Tensor  # (N, K) camera of each source
    age: torch.Tensor  # (N, K) seconds
    target: torch.Tensor  # (N, 4, 4) image_T_ego of each missing map
    source_T_target: torch.Tensor  # (N, K, 4, 4), from the missing map's image to the source's, both in pixels
    every: bool = False  # whether they are those of a graph of fixed shapes, in which all maps are worked on

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each place of `index` that names a map, or with `every` of all places."""
        return wanted_maps(self.index >= 0, self.every)

    def by_moment(self, maps: int) -> list[tuple[int, torch.Tensor]]:
        """The moments that `maps` names, ascending, and which of the B·V maps of each."""
        if self.every:
            return [(step, torch.arange(maps)) for step in range(len(self.maps) // maps)]
        moment, place = self.maps // maps, self.maps % maps
        return [(step, place[moment == step]) for step in moment.unique().tolist()]

    @property
    def kind(self) -> torch.Tensor:
        """(N, K): 0 = the camera's own past, 1 = another one's past, 2 = another one's present."""
        return torch.where(self.age == 0, 2, (self.of != self.camera[:, None]).long())


def list_sources(
    missing: torch.Tensor,
    frame: RigFrame,
    past: Sequence[HistoryFrame],
    table: torch.Tensor,
    moments: int,
    *,
    every: bool = False,
) -> Sources:
    """Lists for each missing map the newest `moments` maps of every camera that `table` (V, W; −1 padded) names, and
    the present map of those that are not missing. Past maps count where they are `available`; missing (B, V) is on the
    CPU. `every` lists them for the present maps too, and every map that there is, so that no shape hangs on a value."""
    batch, views = missing.shape
    sample, camera = wanted_maps(missing, every)
    wanted = table[camera]  # (N, W)
    listed, named = wanted >= 0, wanted.clamp(min=0)
    there = torch.stack([~missing, *(then.available for then in past)])  # (T + 1, B, V)
    there = there[:, sample[:, None], named] & listed  # (T + 1, N, W)
    slots = [torch.where(there[0], 0, -1)]
    newest = there[1:].long().cumsum(0)
    for place in range(1, min(moments, len(past)) + 1):
        hit = there[1:] & (newest == place)
        slots.append(torch.where(hit.any(0), hit.long().argmax(0) + 1 if len(past) else 0, -1))
    moment = torch.cat(slots, dim=1)  # (N, K), −1 = none
    used, of = moment >= 0, wanted.clamp(min=0).repeat(1, len(slots))

    which = (moment.clamp(min=0) * batch + sample[:, None]) * views + of
    maps = torch.arange((len(past) + 1) * batch * views) if every else which[used].unique()
    index = torch.where(used, which if every else torch.searchsorted(maps, which), -1)

    frames = [frame, *(then.frame for then in past)]
    at = moment.clamp(min=0), sample[:, None].expand_as(moment)
    image_T_ego, world_T_ego, time = (
        torch.stack([getattr(each, name).cpu() for each in frames])
        for name in ("image_T_ego", "world_T_ego", "timestamp")
    )
    target = image_T_ego[0, sample, camera]
    then_T_now = torch.linalg.solve(world_T_ego[at], world_T_ego[0, sample][:, None])
    between = image_T_ego[(*at, of)] @ then_T_now @ torch.linalg.inv(target)[:, None]
    age = time[0, sample][:, None] - time[at]
    return Sources(sample, camera, index, maps, of, age, target, between, every)


@dataclass(frozen=True, eq=False)
class Hypotheses:
    """Where the cells of N targets lie in K sources each: at J − 2 depths, on the ground, and where they are.

    The ground of a cell is where its ray meets z = 0 of the ego frame, so no depth has to be known there. What moves as
    the rig does, a car ahead or the own bonnet, stays in its cell: that is for the camera's own past alone.
    """

    projection: torch.Tensor  # (N, K, J, 3, 4) float32, for `multi_depth_warp` at `depths`
    depths: torch.Tensor  # (J,) float32, metres; 1 for the last two, which need none
    seen: torch.Tensor  # (N, K, J, H, W) bool, the cell lies in the source's view
    ground: torch.Tensor  # (N, H, W) float32, depth of the ground in metres; inf above the horizon


def hypothesize(
    sources: Sources,
    depths: torch.Tensor,
    size: tuple[int, int],
    stride: int,
    source_size: tuple[int, int],
    source_stride: int,
) -> Hypotheses:
    """Forms the hypotheses of target maps of `size` (H, W) with `stride` pixels a cell, in sources of `source_size`."""
    device = depths.device
    cell_T_target, cell_T_source = (_homogeneous(cell_T_image(s)) for s in (stride, source_stride))
    view = cell_T_source @ sources.source_T_target @ torch.linalg.inv(cell_T_target)  # (N, K, 4, 4)
    rises = _ground(cell_T_target @ sources.target)  # (N, 3)
    planes = view[:, :, None, :3].expand(-1, -1, len(depths), -1, -1)
    # On the ground 1 = depth · rises · (u, v, 1), which turns the projection's last column into the others.
    on_ground = view[..., :3, :3] + view[..., :3, 3:] * rises[:, None, None]
    on_ground = F.pad(on_ground, (0, 1))[:, :, None]
    still = (cell_T_source @ torch.linalg.inv(cell_T_target))[:3].expand_as(on_ground)
    projection = torch.cat([planes, on_ground, still], dim=2).float().to(device)
    depths = torch.cat([depths, depths.new_ones(2)])

    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in size), indexing="ij")
    rise = torch.einsum("nc,chw->nhw", rises.float().to(device), torch.stack([u, v, torch.ones_like(u)]))
    ground = torch.where(rise > 1e-6, 1 / rise.clamp(min=1e-6), torch.inf)
    x, y, z = _project(projection, depths, u, v)
    inside = (x >= -0.5) & (x <= source_size[1] - 0.5) & (y >= -0.5) & (y <= source_size[0] - 0.5) & (z > 0.1)
    inside = inside & (sources.index >= 0).to(device)[:, :, None, None, None]
    inside[:, :, -2] &= ground.isfinite()[:, None]
    inside[:, :, -1] &= (sources.kind == 0).to(device)[:, :, None, None]
    return Hypotheses(projection, depths, inside, ground)


def _project(projection, depths, u, v):
    """Places x, y and depths (N, K, J, H, W) of all cells."""
    entry = projection[..., None, None]  # (N, K, J, 3, 4, 1, 1)
    depth = depths[:, None, None]
    x, y, z = ((entry[..., i, 0, :, :] * u + entry[..., i, 1, :, :] * v + entry[..., i, 2, :, :]) for i in range(3))
    x, y, z = (p * depth + entry[..., i, 3, :, :] for i, p in enumerate((x, y, z)))
    return x / z, y / z, z


def _ground(cell_T_ego):
    """Where rays of cells meet the ground: 1 / depth = rises · (u, v, 1), (N, 3); 0 for a camera on or below it."""
    ego_T_cell = torch.linalg.inv(cell_T_ego)
    rises, height = ego_T_cell[:, 2, :3], -ego_T_cell[:, 2, 3:]
    return torch.where(height < -0.05, rises / height, 0)


def _homogeneous(matrix):
    extended = torch.eye(4, dtype=torch.float64)
    extended[:3, :3] = matrix
    return extended
