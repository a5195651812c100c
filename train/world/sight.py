"""Whether the ego vehicle has a clear view of something, judged on the plan of the ground."""

import numpy as np

TALL = 0.6  # metres; lower bodies hide nothing


class Sight:
    """What may stand in the way of a view.

    Args:
        scenery: bodies that never move.
    """

    def __init__(self, scenery):
        self.fixed = np.array(
            [
                (*item.position[:2], np.arctan2(item.rotation[1, 0], item.rotation[0, 0]), *item.body.size)
                for item in scenery
                if item.body.size[2] > TALL
            ]
        ).reshape(-1, 6)

    def sees(self, start, end, reach: float, others) -> bool:
        """Whether `end` (2,) is within `reach` metres of `start` and no other body lies between.

        Args:
            others: (N, 6) x, y, heading, width, length, height of bodies that move.
        """
        distance = np.hypot(*(end - start))
        if not 2.0 < distance < reach:
            return False
        boxes = np.concatenate([others, self.fixed])
        boxes = boxes[(np.linalg.norm(boxes[:, :2] - start, axis=1) < reach + 20) & (boxes[:, 5] > TALL)]
        points = start + np.linspace(0.02, 1 - 0.5 / distance, 40)[:, None] * (end - start)
        delta = points[:, None] - boxes[:, :2]
        c, s = np.cos(boxes[:, 2]), np.sin(boxes[:, 2])
        along, across = delta[..., 0] * c + delta[..., 1] * s, delta[..., 1] * c - delta[..., 0] * s
        return not ((np.abs(along) < boxes[:, 4] / 2) & (np.abs(across) < boxes[:, 3] / 2)).any()
