"""What pictures of all systems share: images of cameras, and lines of the ego frame drawn onto them."""

from collections.abc import Sequence

import torch

from ..modules.rig import NUSCENES_CAMERAS
from .data.images import as_picture

LINE_COLOURS = dict(ped_crossing="tab:blue", divider="tab:orange", boundary="tab:green")  # others are grey
_PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT")
_NEAR = 0.1  # metres in front of a camera from which on something is drawn


def by_place(cameras: Sequence[str]) -> list[str]:
    """Cameras as they look around: nuScenes' from the front left to the right, then those behind; others as given."""
    return [name for name in _PLACES if name in cameras] if set(cameras) <= set(NUSCENES_CAMERAS) else list(cameras)


def show_image(axes, image: torch.Tensor, name: str) -> None:
    """Shows a normalised image (3, H, W) of a camera; what is drawn later does not change the view."""
    height, width = image.shape[-2:]
    axes.imshow(as_picture(image).permute(1, 2, 0).numpy())
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_title(name.removeprefix("CAM_"), fontsize=7, pad=2)


def on_ground(points: torch.Tensor, ground: float) -> torch.Tensor:
    """(N, 2) → (N, 3) at the height of the ground, metres."""
    return torch.cat([points, points.new_full((len(points), 1), ground)], dim=1)


def draw_path(axes, points: torch.Tensor, image_T_ego: torch.Tensor, **style) -> None:
    """Draws a polyline (N, 3) of the ego frame onto an image, where it is in front of the camera."""
    seen = points.double() @ image_T_ego[:3, :3].T + image_T_ego[:3, 3]
    pixels = torch.where(seen[:, 2:] > _NEAR, seen[:, :2] / seen[:, 2:].clamp(min=_NEAR), torch.nan)
    u, v = pixels.T
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    if ((u > 0) & (u < width) & (v > 0) & (v < height)).any():
        axes.plot(u.numpy(), v.numpy(), **style)
