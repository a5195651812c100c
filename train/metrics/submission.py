"""Boxes as rows of nuScenes' results files, for the detection and the tracking task."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

TRACKING_CLASSES = ("bicycle", "bus", "car", "motorcycle", "pedestrian", "trailer", "truck")
CLASS_RANGES = {  # metres from the ego car up to which a class is evaluated (detection_cvpr_2019)
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
MAX_BOXES = 500  # of a sample: the official limit
_MOVING = 0.2  # m/s
# Class → its attribute when it moves, and when it stands.
_ATTRIBUTES = {
    **dict.fromkeys(("car", "truck", "construction_vehicle", "trailer"), ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    **dict.fromkeys(("barrier", "traffic_cone"), ("", "")),
}


def result_rows(
    token: str,
    boxes,
    names: Sequence[str],
    scores,
    world_T_frame: np.ndarray,
    ids: Sequence[str] | None = None,
    ego_T_frame: np.ndarray | None = None,
    ranges: Mapping[str, float] | None = None,
) -> list[dict]:
    """The rows of one sample in the global frame, best first, at most `MAX_BOXES`.

    Boxes that are not finite or have no volume are left out; an unknown velocity is written as 0. The attribute follows
    from class and speed. Rows of the tracking task have only its seven classes.

    Args:
        token: of the sample.
        boxes: (K, 9): x, y, z of the centre, length, width, height, yaw, velocity in x and y over the ground, in some
            frame; metres, radians, m/s. Arrays or CPU tensors.
        names: K detection classes.
        scores: (K,).
        world_T_frame: (4, 4) rigid.
        ids: of the tracked objects, unique over the whole file; None = rows of the detection task.
        ego_T_frame: (4, 4) rigid, for `ranges`; None = the frame is the ego car's.
        ranges: class → metres from the ego car's origin, in x and y, beyond which boxes are left out; None = all stay.

    Raises:
        ValueError: a class that nuScenes does not have.
    """
    unknown = sorted(set(names) - _ATTRIBUTES.keys())
    if unknown:
        raise ValueError(f"names has {unknown[0]!r}; nuScenes' classes are {', '.join(_ATTRIBUTES)}")
    boxes, scores = (np.asarray(values, dtype=np.float64) for values in (boxes, scores))
    boxes = boxes.reshape(len(scores), 9)
    kept = np.isfinite(boxes[:, :7]).all(axis=1) & (boxes[:, 3:6] > 0).all(axis=1) & np.isfinite(scores)
    if ids is not None:
        kept &= np.isin(np.asarray(names, dtype=str), TRACKING_CLASSES)
    if ranges is not None:
        ego_T_frame = np.eye(4) if ego_T_frame is None else ego_T_frame
        away = np.hypot(*(boxes[:, :3] @ ego_T_frame[:2, :3].T + ego_T_frame[:2, 3]).T)
        kept &= away <= np.array([ranges[name] for name in names]).reshape(away.shape)
    order = np.flatnonzero(kept)
    order = order[np.argsort(-scores[order], kind="stable")][:MAX_BOXES]
    boxes, scores = boxes[order], scores[order].tolist()
    turn = world_T_frame[:3, :3]
    centres = (boxes[:, :3] @ turn.T + world_T_frame[:3, 3]).tolist()
    sizes = boxes[:, [4, 3, 5]].tolist()  # nuScenes writes width, length, height
    velocities = np.nan_to_num(boxes[:, 7:], nan=0.0, posinf=0.0, neginf=0.0)
    moving = np.hypot(*velocities.T) > _MOVING
    velocities = (velocities @ turn[:2, :2].T).tolist()
    quaternions = np.empty((0, 4))
    if len(order):
        turned = Rotation.from_matrix(turn) * Rotation.from_rotvec(boxes[:, 6:7] * [0, 0, 1])
        quaternions = turned.as_quat()[:, [3, 0, 1, 2]]
    rows = []
    for place, centre, size, quaternion, velocity, score, moves in zip(
        order, centres, sizes, quaternions.tolist(), velocities, scores, moving
    ):
        row = dict(sample_token=token, translation=centre, size=size, rotation=quaternion, velocity=velocity)
        name = str(names[place])
        if ids is None:
            own = dict(detection_name=name, detection_score=score, attribute_name=_ATTRIBUTES[name][0 if moves else 1])
        else:
            own = dict(tracking_name=name, tracking_score=score, tracking_id=str(ids[place]))
        rows.append(row | own)
    return rows
