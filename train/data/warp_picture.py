"""Shows, and measures, on real images that the warp lands: a static object seen a moment ago, moved to the present.

The object's box gives the true depth of its surface, so a right projection puts the history's picture of the object
exactly onto the present one, whatever the car did in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ...kernels import multi_depth_warp
from ...modules.rig import Camera, ImageAugmentation, relative_projection
from .moments import Box, Drive, Moment

_STILL = 0.05  # metres between moments that an annotation of a static object may move
_LEVELS = 8  # depth hypotheses across one object
# Corners of `Box.corners` joined by an edge: the front face, the back face, and between them.
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


@dataclass(frozen=True, eq=False)
class WarpedView:
    """A window of one camera's image round a static object, and what history makes of it.

    Args:
        history: (3, H, W), the same window of the past image: what "no warp" gives.
        warped: (3, H, W), the past image warped to the present at the object's depth.
        present: (3, H, W), the truth.
        inside: (H, W) bool, the pixels of the object's box that the warp covers.
        corners: (8, 2), the box's corners in the window, pixels.
        title: scene, camera, category, distance, time apart.
    """

    history: torch.Tensor
    warped: torch.Tensor
    present: torch.Tensor
    inside: torch.Tensor
    corners: torch.Tensor
    title: str

    @property
    def similarity(self) -> float:
        """Normalised cross-correlation of the warped image with the present inside the object, 1 = equal."""
        return similarity(self.warped, self.present, self.inside)

    @property
    def similarity_without_warp(self) -> float:
        """The same of the history as it was."""
        return similarity(self.history, self.present, self.inside)


def static_objects(
    drive: Drive, min_pixels: float = 2000, max_distance: float = 40
) -> Iterator[tuple[Moment, Moment, str, Box]]:
    """Finds (past, now, camera, box) for each consecutive pair of a drive, and each object within `max_distance` metres
    that did not move, that both images of the camera show whole, and whose outline there spans at least `min_pixels`.
    `box` is in the present ego frame."""
    for past, now in pairwise(drive):
        cameras = [camera for camera in now.rig.names if past.image_path(camera) and now.image_path(camera)]
        then = {box.instance: box for box in past.boxes}
        for world_box, box in zip(now.boxes, now.ego_boxes):
            before = then.get(world_box.instance)
            if before is None or box.center.norm() > max_distance:
                continue
            if torch.dist(before.center, world_box.center) > _STILL:
                continue
            earlier = before.moved(torch.linalg.inv(past.world_T_ego))
            for camera in cameras:
                seen = _outline(now.rig[camera], box), _outline(past.rig[camera], earlier)
                if all(corners is not None and _area(corners) >= min_pixels for corners in seen):
                    yield past, now, camera, box


def warp_to_object(
    past: Moment,
    now: Moment,
    camera: str,
    box: Box,
    *,
    source: str | None = None,
    depth_factor: float = 1.0,
    margin: float = 0.5,
) -> WarpedView:
    """Warps a past image to the present view of `camera` at the depth of the visible surface of `box`.

    Args:
        past, now: moments of one drive that have the images.
        camera: whose present view is filled.
        box: a static object, in the present ego frame, whole in the present image.
        source: the camera whose past is read; None = `camera` itself.
        depth_factor: times the true depth; anything but 1 is wrong on purpose.
        margin: of the window round the object, in sizes of the object.
    """
    source, full = source or camera, now.rig[camera]
    window = _window(full, box, margin)
    view = full.augmented(window)
    depth = surface_depth(view, box)
    on_object = depth.isfinite()
    depths, weights = _hypotheses(torch.where(on_object, depth, depth[on_object].median()) * depth_factor)
    projection = relative_projection(
        view.image_T_ego, past.rig[source].image_T_ego, torch.linalg.solve(past.world_T_ego, now.world_T_ego)
    )
    image = past.image(source)
    warped, coverage = multi_depth_warp(
        image[None], projection[None], depths, weights=weights[None], output_size=(view.height, view.width)
    )
    left, top, width, height = window.crop
    cut = (..., slice(top, top + height), slice(left, left + width))
    return WarpedView(
        history=image[cut],
        warped=warped[0],
        present=now.image(camera)[cut],
        inside=on_object & (coverage[0] > 0.99),
        corners=_outline(view, box),
        title=f"{now.scene}, {camera} from {source} {now.timestamp - past.timestamp:.1f} s before: "
        f"{box.category} at {depth[on_object].median():.0f} m",
    )


def draw_warps(drives: Sequence[Drive], path: str | Path, examples: int = 3) -> list[WarpedView]:
    """Draws history, warped history and present side by side for the largest static objects of the first drive that
    has any, each object once, saves the picture (PNG, SVG or PDF by its suffix) and returns what it shows. Draws
    nothing and returns [] where no two consecutive moments have images of a static object."""
    found = next(filter(None, (list(static_objects(drive)) for drive in drives)), [])
    found.sort(key=lambda item: _area(_outline(item[1].rig[item[2]], item[3])))
    largest = {box.instance: (past, now, camera, box) for past, now, camera, box in found}
    views = [warp_to_object(*item) for item in list(largest.values())[::-1][:examples]]
    if views:
        _draw(views).savefig(path, dpi=120, bbox_inches="tight")
    return views


def surface_depth(camera: Camera, box: Box) -> torch.Tensor:
    """The depth, (height, width) float64, at which each pixel's ray enters `box` (in the ego frame); inf = not."""
    v, u = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    box_T_cam = torch.linalg.inv(camera.cam_T_ego @ box.frame_T_box)
    rays = pixels @ torch.linalg.inv(camera.intrinsics).T @ box_T_cam[:3, :3].T  # one unit of depth each
    half = torch.tensor(box.size, dtype=torch.float64) / 2
    crossings = torch.stack([(-half - box_T_cam[:3, 3]) / rays, (half - box_T_cam[:3, 3]) / rays])
    enter, leave = crossings.amin(0).amax(-1), crossings.amax(0).amin(-1)
    return torch.where((enter < leave) & (enter > 0), enter, torch.inf)


def similarity(image: torch.Tensor, other: torch.Tensor, inside: torch.Tensor) -> float:
    """Normalised cross-correlation of the brightness of two images (3, H, W) over the pixels `inside` (H, W)."""
    a, b = (picture.mean(0)[inside].double() for picture in (image, other))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-12))


def _hypotheses(depth):
    """Makes depths (D,) and one-hot weights (D, H, W) that give each pixel the hypothesis nearest to its depth."""
    levels = torch.linspace(1 / depth.max(), 1 / depth.min(), _LEVELS, dtype=torch.float64)
    nearest = (1 / depth[..., None] - levels).abs().argmin(dim=-1)
    return (1 / levels).float(), torch.nn.functional.one_hot(nearest, _LEVELS).movedim(-1, 0).float()


def _outline(camera, box):
    """The pixels (8, 2) of the corners of a box in the ego frame; None unless the image shows all of them."""
    corners = torch.cat([box.corners(), torch.ones(8, 1, dtype=torch.float64)], dim=1) @ camera.image_T_ego.T
    pixels = corners[:, :2] / corners[:, 2:3]
    size = torch.tensor([camera.width, camera.height])
    whole = (corners[:, 2] > 0).all() and (pixels > -0.5).all() and (pixels < size - 0.5).all()
    return pixels if whole else None


def _area(corners):
    return float((corners.amax(0) - corners.amin(0)).prod())


def _window(camera, box, margin):
    corners = _outline(camera, box)
    if corners is None:
        raise ValueError(f"warp_to_object: {camera.name} does not show the whole {box.category} {box.instance}")
    low, high = corners.amin(0), corners.amax(0)
    pad = margin * (high - low)
    left, top = (low - pad).floor().clamp(min=0).int().tolist()
    right, bottom = torch.minimum((high + pad).ceil(), torch.tensor([camera.width, camera.height])).int().tolist()
    return ImageAugmentation(crop=(left, top, right - left, bottom - top))


def _draw(views):
    from matplotlib.figure import Figure

    heights = [4 * min(view.present.shape[1] / view.present.shape[2], 1.2) + 0.6 for view in views]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    for row, view in zip(figure.subplots(len(views), 3, squeeze=False, height_ratios=heights), views):
        captions = (
            f"history as it was ({view.similarity_without_warp:.2f} alike)",
            f"history warped to the present ({view.similarity:.2f} alike)",
            "present",
        )
        for axes, picture, caption in zip(row, (view.history, view.warped, view.present), captions):
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            for start, end in _EDGES:
                axes.plot(*view.corners[[start, end]].T.numpy(), color="#00e0ff", linewidth=0.8)
            axes.set_title(caption, fontsize=9)
            axes.set_axis_off()
        row[1].set_title(f"{view.title}\n{captions[1]}", fontsize=9)
    return figure
