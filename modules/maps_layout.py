"""Where the maps of a detector lie in space, and in which of their cells a point is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rig import cell_T_image

POINT_RANGE = (-51.2, -51.2, -3.0, 51.2, 51.2, 5.0)  # x_min, y_min, z_min, x_max, y_max, z_max, metres, ego frame
MIN_DEPTH = 0.1  # metres in front of a camera from which on it sees a point


@dataclass(frozen=True)
class MapLayout:
    """The maps whose tokens a decoder reads: a bird's-eye-view (BEV) map, then one map of each camera.

    Cells are (column, row), integers at cell centres. Geometry is formed in float64 and narrowed last.

    Args:
        bev_shape: (H, W) of the BEV map, which spans `point_range`; rows run along +y, columns along +x.
        view_shape: (h, w) of the map of each camera.
        cameras: V.
        stride: image pixels per cell of the camera maps.
        point_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres, ego frame.
        bev_extent: metres along x and y that the BEV map spans from the range's lower corner; None = the range's own.
    """

    bev_shape: tuple[int, int] = (128, 128)
    view_shape: tuple[int, int] = (20, 50)
    cameras: int = 6
    stride: int = 16
    point_range: tuple[float, ...] = POINT_RANGE
    bev_extent: tuple[float, float] | None = None

    def metres(self, reference: torch.Tensor) -> torch.Tensor:
        """Points (…, 3) in [0, 1] of the range → metres, ego frame. Gradients pass."""
        low, high = range_bounds("MapLayout: point_range", self.point_range, reference.device)
        return low + (high - low) * reference

    def cells(self, points: torch.Tensor, image_T_ego: torch.Tensor) -> torch.Tensor:
        """The cells in which points lie, on each map.

        Args:
            points: (B, N, 3) metres, ego frame. Gets no gradient.
            image_T_ego: (B, V, 3 or 4, 4) float64, see `RigFrame`.

        Returns:
            (B, N, 1 + V, 2) float32, the BEV map first; NaN where a point is not on the map.

        Raises:
            ValueError: a shape does not fit.
            TypeError: `image_T_ego` is not float64.
        """
        views = self.view_cells(points, image_T_ego)
        if views.shape[2] != self.cameras:
            raise ValueError(f"image_T_ego has {views.shape[2]} cameras, needs {self.cameras}")
        return torch.cat([self.bev_cells(points)[:, :, None], views], dim=2)

    def bev_cells(self, points: torch.Tensor) -> torch.Tensor:
        """The cells (B, N, 2) of points (B, N, 3) on the BEV map, NaN for one that lies beside it (whatever its height)
        or is not finite."""
        points = points.detach().double()
        (height, width), low, high = self.bev_shape, self.point_range[:3], self.point_range[3:]
        extent = self.bev_extent or (high[0] - low[0], high[1] - low[1])
        columns, rows = (
            (points[..., axis] - low[axis]) * (cells / extent[axis]) - 0.5 for axis, cells in ((0, width), (1, height))
        )
        finite = points.isfinite().all(-1, keepdim=True)
        return _on_the_map(torch.stack([columns, rows], dim=-1), self.bev_shape, finite)

    def view_cells(self, points: torch.Tensor, image_T_ego: torch.Tensor) -> torch.Tensor:
        """The cells (B, N, V, 2) of points (B, N, 3) on the cameras' maps, NaN where a camera does not see the point:
        beside the map, at most 0.1 m in front of the camera, or not finite."""
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"the points have shape {tuple(points.shape)}, need (B, N, 3)")
        check_projection(image_T_ego, len(points))
        cell_T_ego = cell_T_image(self.stride).to(points.device) @ image_T_ego[:, :, :3].to(points.device)
        x, y, depth = project_points(points.detach().double(), cell_T_ego).unbind(-1)
        return _on_the_map(torch.stack([x / depth, y / depth], dim=-1), self.view_shape, (depth > MIN_DEPTH)[..., None])


def project_points(points: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Points (B, N, 3) through each camera's projection (B, V, 3, 4) → (B, N, V, 3): x · depth, y · depth, depth."""
    return torch.einsum("bvij,bnj->bnvi", projection[..., :3], points) + projection[:, None, :, :, 3]


def check_projection(image_T_ego: torch.Tensor, batch: int | None = None) -> None:
    """Raises unless `image_T_ego` is (B, V, 3 or 4, 4) float64, of `batch` samples where that is given."""
    shape = tuple(image_T_ego.shape)
    if len(shape) != 4 or batch not in (None, shape[0]) or shape[2] not in (3, 4) or shape[3] != 4:
        raise ValueError(f"image_T_ego has shape {shape}, needs ({'B' if batch is None else batch}, V, 3 or 4, 4)")
    if image_T_ego.dtype != torch.float64:
        dtype = str(image_T_ego.dtype).removeprefix("torch.")
        raise TypeError(f"image_T_ego is {dtype}, needs float64 (poses lose centimetres in float32)")


def range_bounds(name: str, bounds: Sequence[float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest corner of a range in metres, (3,) float32 each; `name` is for the error message."""
    if len(bounds) != 6 or not all(low < high for low, high in zip(bounds[:3], bounds[3:])):
        needed = "(x_min, y_min, z_min, x_max, y_max, z_max), each minimum below its maximum"
        raise ValueError(f"{name} is {tuple(bounds)}, needs {needed}")
    low, high = torch.tensor(bounds, dtype=torch.float32, device=device).split(3)
    return low, high


def _on_the_map(cells, shape, valid):
    """Cells as float32, NaN outside. Tested after the narrowing, so that no cell is rounded off the map."""
    cells = cells.float()
    size = cells.new_tensor([shape[1], shape[0]])
    valid = valid & ((cells >= -0.5) & (cells < size - 0.5)).all(-1, keepdim=True)
    return torch.where(valid, cells, torch.nan)
