"""Which cameras a camera attends to. Always by name: cameras come in different orders in different codebases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .rig import NUSCENES_CAMERAS, Camera, Rig, camera_index

_NEIGHBOURS = {
    "CAM_FRONT": ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"),
    "CAM_FRONT_LEFT": ("CAM_FRONT", "CAM_BACK_LEFT"),
    "CAM_FRONT_RIGHT": ("CAM_FRONT", "CAM_BACK_RIGHT"),
    "CAM_BACK_LEFT": ("CAM_FRONT_LEFT", "CAM_BACK"),
    "CAM_BACK_RIGHT": ("CAM_FRONT_RIGHT", "CAM_BACK"),
    "CAM_BACK": ("CAM_BACK_LEFT", "CAM_BACK_RIGHT"),
}
TOPOLOGIES = ("global", "neighbours", "own")


@dataclass(frozen=True)
class Topology:
    """Says for each camera which cameras it attends to, in order.

    Args:
        attends: camera name → camera names, none of them twice. Every name must itself be a key.
    """

    attends: Mapping[str, tuple[str, ...]]

    def __post_init__(self):
        attends = {camera: tuple(others) for camera, others in self.attends.items()}
        object.__setattr__(self, "attends", attends)
        for camera, others in attends.items():
            for other in others:
                camera_index(other, tuple(attends))
            if len(set(others)) != len(others):
                raise ValueError(f"Topology: {camera} attends to {', '.join(others)}; each camera may stand there once")

    @staticmethod
    def named(name: str, cameras: Sequence[str] = NUSCENES_CAMERAS) -> "Topology":
        """Makes one of `TOPOLOGIES` over these cameras.

        "global": every camera (V1). "own": the camera itself. "neighbours" (V2): the camera itself and those left and
        right of it round the car, for nuScenes' cameras; neighbours that are not among `cameras` are left out.
        """
        if name == "global":
            return Topology({camera: tuple(cameras) for camera in cameras})
        if name == "own":
            return Topology({camera: (camera,) for camera in cameras})
        if name == "neighbours":
            for camera in cameras:
                camera_index(camera, NUSCENES_CAMERAS)
            present = {c: tuple(other for other in _NEIGHBOURS[c] if other in cameras) for c in cameras}
            return Topology({camera: (camera, *others) for camera, others in present.items()})
        raise ValueError(f"no topology {name!r}; choose one of {', '.join(TOPOLOGIES)}, or make a Topology")

    @staticmethod
    def from_calibration(
        rig: Rig, *, min_overlap: float = 0.01, depths: Sequence[float] = (5.0, 10.0, 20.0, 40.0)
    ) -> "Topology":
        """Lets each camera attend to itself, then to those that share at least `min_overlap` of a view with it, in the
        rig's order.

        See `view_overlap`; of the two fractions of a pair the larger one counts, so the relation is mutual.
        """
        overlap = view_overlap(rig, depths)
        mutual = torch.maximum(overlap, overlap.T) >= min_overlap
        return Topology(
            {
                name: (name, *(other for j, other in enumerate(rig.names) if j != i and mutual[i, j]))
                for i, name in enumerate(rig.names)
            }
        )

    def table(self, cameras: Sequence[str]) -> torch.Tensor:
        """Lists for each of `cameras` the indices in `cameras` that it attends to, (V, K) int64, filled up with −1."""
        rows = []
        for camera in cameras:
            camera_index(camera, tuple(self.attends))
            rows.append([camera_index(other, cameras) for other in self.attends[camera]])
        width = max((len(row) for row in rows), default=0)
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(-1, width)


def view_overlap(rig: Rig, depths: Sequence[float] = (5.0, 10.0, 20.0, 40.0), steps: int = 40) -> torch.Tensor:
    """Measures the fraction of camera i's view that camera j sees too, (V, V) float64, over points of a regular grid of
    `steps` × `steps` places in the image at each of `depths` metres."""
    overlap = torch.empty(len(rig.cameras), len(rig.cameras), dtype=torch.float64)
    for i, camera in enumerate(rig.cameras):
        points = torch.cat([_ego_points(camera, depth, steps) for depth in depths])
        for j, other in enumerate(rig.cameras):
            overlap[i, j] = _sees(other, points).double().mean()
    return overlap


def _ego_points(camera: Camera, depth: float, steps: int) -> torch.Tensor:
    """(steps², 4) homogeneous ego points at `depth` that fill the camera's view."""
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * camera.width - 0.5
    v = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * camera.height - 0.5
    v, u = torch.meshgrid(v, u, indexing="ij")
    depth = torch.full_like(u, depth)
    image = torch.stack([u * depth, v * depth, depth, torch.ones_like(u)], dim=-1).flatten(0, 1)
    return image @ torch.linalg.inv(camera.image_T_ego).T


def _sees(camera: Camera, ego_points: torch.Tensor) -> torch.Tensor:
    x, y, depth, _ = (ego_points @ camera.image_T_ego.T).unbind(1)
    u, v = x / depth, y / depth
    return (depth > 0) & (u > -0.5) & (u < camera.width - 0.5) & (v > -0.5) & (v < camera.height - 0.5)
