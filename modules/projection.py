"""Where points are seen, as `deformable_aggregation` takes them."""

import torch

NEAREST = 1e-5  # metres; what is not in front of a camera by more is not in its image


def project(
    points: torch.Tensor, projection: torch.Tensor, image_size: tuple[int, int], half_pixel: bool = True
) -> torch.Tensor:
    """Where ego points are seen in the images of a rig.

    In float32, without matrix products, whose TensorFloat-32 misses pixels; under autocast too.

    Args:
        points: (B, N, P, 3) metres, ego frame. Get gradients.
        projection: (B, V, 4, 4) float32, ego points (x, y, z, 1) to (u·depth, v·depth, depth, 1), pixels.
        image_size: height, width.
        half_pixel: pixel centres lie at integers; False = at halves, as upstream SparseDrive has them.

    Returns:
        (B, N, P, V, 2), (x, y) in [0, 1] of each camera's image; −1 where a point is not in front of a camera.
    """
    with torch.autocast(points.device.type, enabled=False):
        rows = projection[:, None, None, :, :3]  # (B, 1, 1, V, 3, 4)
        x, y, z = (coordinate[..., None, None] for coordinate in points.unbind(-1))  # (B, N, P, 1, 1)
        seen = rows[..., 0] * x + rows[..., 1] * y + rows[..., 2] * z + rows[..., 3]  # (B, N, P, V, 3)
        depth = seen[..., 2:]
        shift = 0.5 if half_pixel else 0.0
        height, width = image_size
        location = (seen[..., :2] / depth.clamp(min=NEAREST) + shift) / seen.new_tensor([width, height])
        return torch.where(depth > NEAREST, location, -1)
