"""Ground-truth sampling: objects of other frames are put into one, in its points and in its images.

After SECOND (Yan et al. 2018) and, for images, CMT (Yan et al. 2023). Upstream draws each object from a database made
beforehand; here a few donor frames are read whole, so that nothing has to be made and kept. Objects stay where they are
in the donor's frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

QUOTAS = (2, 3, 7, 4, 6, 2, 6, 6, 2, 2)  # so many of each class a frame is brought to
MIXED = 0.5  # share of a pasted picture, the rest stays what it was
_FRONT = 0.5  # metres; a box that reaches nearer to the camera's plane is not pasted into its image


@dataclass
class Frame:
    """What sampling reads and changes of a key frame, all in one frame of reference, before augmentation of space.

    Args:
        images: (V, 3, H, W) uint8.
        image_T_frame: (V, 4, 4) float64.
        points: (P, 5), see `DetectionInput`.
        boxes, labels: (G, 9) and (G,), see `DetectionInput`.
    """

    images: torch.Tensor
    image_T_frame: torch.Tensor
    points: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor


def put_objects(into: Frame, donors: Sequence[Frame], rng: np.random.Generator) -> Frame:
    """Puts objects of the donors into a frame, until it has `QUOTAS` of every class or nothing fits any more.

    None overlaps another, judged by the circles round the boxes. The points in a new box are replaced by the donor's;
    its pictures are mixed in from far to near. The images change in place.
    """
    boxes, labels, chosen = [into.boxes], [into.labels], []
    counts = torch.bincount(into.labels, minlength=len(QUOTAS)).tolist()
    for donor in donors:
        for index in rng.permutation(len(donor.boxes)).tolist():
            box, label = donor.boxes[index : index + 1], donor.labels[index : index + 1]
            if counts[int(label)] < QUOTAS[int(label)] and _apart(box, torch.cat(boxes)):
                counts[int(label)] += 1
                boxes.append(box)
                labels.append(label)
                chosen.append((donor, box))
    if not chosen:
        return into
    new = torch.cat(boxes[1:])
    kept = into.points[~inside_boxes(into.points, new).any(0)]
    added = [donor.points[inside_boxes(donor.points, box)[0]] for donor, box in chosen]
    for donor, box in sorted(chosen, key=lambda pair: -float(pair[1][0, :2].norm())):
        _paste(into, donor, box[0])
    points = torch.cat([kept, *added])
    return Frame(into.images, into.image_T_frame, points, torch.cat(boxes), torch.cat(labels))


def inside_boxes(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Which points (P, 3 + …) are in which boxes (G, 9), (G, P) bool."""
    offset = points[None, :, :3] - boxes[:, None, :3]
    cos, sin = boxes[:, 6:7].cos(), boxes[:, 6:7].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    aside = offset[..., 1] * cos - offset[..., 0] * sin
    return (torch.stack([along, aside, offset[..., 2]], dim=-1).abs() <= boxes[:, None, 3:6] / 2).all(-1)


def _apart(box, others):
    reach = box[:, 3:5].norm(dim=1) / 2 + others[:, 3:5].norm(dim=1) / 2
    return bool(((box[:, :2] - others[:, :2]).norm(dim=1) > reach).all())


def _paste(into, donor, box):
    for camera, (to, source) in enumerate(zip(into.image_T_frame, donor.image_T_frame)):
        target, there = (_picture(box, projection, into.images.shape[-2:]) for projection in (to, source))
        if target is None or there is None:
            continue
        (left, top, right, bottom), (x0, y0, x1, y1) = target, there
        patch = donor.images[None, camera, :, y0:y1, x0:x1].float()
        patch = F.interpolate(patch, size=(bottom - top, right - left), mode="bilinear", align_corners=False)[0]
        place = into.images[camera, :, top:bottom, left:right]
        place.copy_((MIXED * patch + (1 - MIXED) * place.float()).round())


def _picture(box, image_T_frame, size):
    """The rectangle of pixels (left, top, right, bottom) that a box covers in an image (height, width); None where it
    covers less than 2 × 2, or is not wholly before the camera."""
    x, y, z, length, width, height, yaw = box[:7].double()
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=torch.float64)
    along, aside, up = (signs * torch.stack([length, width, height]) / 2).unbind(1)
    cos, sin = yaw.cos(), yaw.sin()
    corners = torch.stack([x + cos * along - sin * aside, y + sin * along + cos * aside, z + up], dim=1)
    u, v, depth = (corners @ image_T_frame[:3, :3].T + image_T_frame[:3, 3]).unbind(1)
    if depth.min() < _FRONT:
        return None
    (rows, columns), u, v = size, u / depth, v / depth
    left, right = (int(value) for value in (u.min().clamp(0, columns), u.max().clamp(0, columns)))
    top, bottom = (int(value) for value in (v.min().clamp(0, rows), v.max().clamp(0, rows)))
    return (left, top, right, bottom) if min(right - left, bottom - top) >= 2 else None
