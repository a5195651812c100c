"""A picture of a rig from above: the cameras, what they see, and who attends to whom."""

from pathlib import Path

import torch

from .rig import Camera, Rig
from .topology import Topology

_REACH = 12.0  # metres of each field of view that are drawn
_RING = 4.6  # metres from the middle of the rig at which the arrows join the cameras


def draw_rig(rig: Rig, topology: Topology, path: str | Path, title: str = "") -> None:
    """Saves a top view, the car driving up the page: each camera's field of view, and an arrow from each camera to
    those that attend to it. PNG, SVG or PDF by the suffix of `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.2), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    middle = torch.stack([_position(camera) for camera in rig.cameras]).mean(0)
    anchors = {}
    for i, camera in enumerate(rig.cameras):
        colour = f"C{i}"
        view = _page(_field_of_view(camera))
        axes.fill(*view.T, facecolor=colour, edgecolor=colour, alpha=0.16)
        axes.plot(*_page(_position(camera)), "o", color=colour, markersize=4)
        forward = _direction(camera, (camera.width - 1) / 2)
        anchors[camera.name] = _page(middle + _RING * forward)
        x, y = _page(middle + (_REACH + 1.3) * forward)
        label = camera.name.removeprefix("CAM_").replace("_", " ")
        axes.text(x, y, label, color=colour, ha="center", va="center", fontsize=9, weight="bold")
    for i, name in enumerate(rig.names):
        axes.plot(*anchors[name], "o", color=f"C{i}", markersize=9)
        for other in topology.attends[name]:
            if other != name:
                _arrow(axes, anchors[other], anchors[name], f"C{rig.index(other)}")
    limit = _REACH + 2.5
    axes.set(xlim=(-limit, limit), ylim=(float(middle[0]) - limit, float(middle[0]) + limit), title=title)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _arrow(axes, start, end, colour):
    style = dict(arrowstyle="-|>", color=colour, shrinkA=6, shrinkB=6, linewidth=1.4, connectionstyle="arc3,rad=0.12")
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _page(points):
    """Ego (x forward, y left) to page (right, up)."""
    x, y = points.unbind(-1)
    return torch.stack([-y, x], dim=-1).numpy()


def _position(camera: Camera):
    return camera.ego_T_cam[:2, 3]


def _direction(camera: Camera, u: float):
    """Unit vector, seen from above, of the ray through the middle of pixel column u."""
    pixel = torch.tensor([u, (camera.height - 1) / 2, 1], dtype=torch.float64)
    ray = (camera.ego_T_cam[:3, :3] @ torch.linalg.inv(camera.intrinsics) @ pixel)[:2]
    return ray / ray.norm()


def _field_of_view(camera: Camera, steps: int = 24):
    columns = torch.linspace(-0.5, camera.width - 0.5, steps).tolist()
    rim = [_position(camera) + _REACH * _direction(camera, u) for u in columns]
    return torch.stack([_position(camera), *rim])
