"""Whether the ego vehicle has a clear view of something, judged on the plan of the ground."""

import numpy as np

ROOF = 1.8  # metres


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
                if item.kind != "speed_bump"
            ]
        ).reshape(-1, 6)

    def sees(self, start, target, reach: float, others) -> bool:
        """Whether the roof sensor at `start` (2,) has a clear view of a target within `reach` metres.

        Args:
            target, others: (6,) and (N, 6) x, y, heading, width, length, height of it and of bodies that move.
        """
        distance = np.hypot(*(target[:2] - start))
        if not 2.0 < distance < reach:
            return False
        boxes = np.concatenate([others, self.fixed])
        boxes = boxes[np.linalg.norm(boxes[:, :2] - start, axis=1) < reach + 20]
        share = np.linspace(0.02, 1 - 0.5 / distance, 40)[:, None]
        delta = start + share * (target[:2] - start) - boxes[:, None, :2]
        c, s = np.cos(boxes[:, 2:3]), np.sin(boxes[:, 2:3])
        along, across = delta[..., 0] * c + delta[..., 1] * s, delta[..., 1] * c - delta[..., 0] * s
        inside = (np.abs(along) < boxes[:, 4:5] / 2) & (np.abs(across) < boxes[:, 3:4] / 2)
        ray = ROOF + share.T * (0.6 * target[5] - ROOF)
        return not (inside & (ray < boxes[:, 5:6])).any()
