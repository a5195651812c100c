"""The thirteen tables of a generated world. Tokens are md5 sums of (seed, table, key), so they can be made again.

The rows of `log` have a field that nuScenes lacks: `town`, the name of the town the scene drives through.
"""

import hashlib
from functools import partial

import numpy as np

from ...modules.poses import to_quaternion
from .scene import Scene
from .sensors import EGO_T_LIDAR, EXPOSURE, LIDAR, Camera, box_of, near

PLACES = ("singapore-onenorth", "boston-seaport", "singapore-queenstown", "singapore-hollandvillage")
EPOCH = 1_600_000_000_000_000  # microseconds
SCENE_APART = 1_000_000_000  # microseconds from the start of a scene to that of the next
VEHICLE = "world"
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
LEVELS = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", 2.0))


def make_token(seed: int, table: str, key) -> str:
    return hashlib.md5(f"{seed}/{table}/{key}".encode()).hexdigest()


def scene_name(index: int) -> str:
    return f"world-{index:04d}"


def microseconds(scene: int, t: float) -> int:
    return EPOCH + scene * SCENE_APART + round(t * 1e6)


def shots(cameras: list[Camera], samples: int, period: float, sweeps: int):
    """What the sensors record in a scene, in order: (sample, channel, seconds, whether it is a key frame)."""
    for k in range(samples):
        for camera in cameras:
            yield k, camera.name, k * period + EXPOSURE[camera.name], True
        yield k, LIDAR, k * period, True
        if k + 1 < samples:
            for j in range(1, sweeps + 1):
                yield k, LIDAR, k * period + j * period / (sweeps + 1), False


def file_name(seed: int, scene: int, channel: str, t: float, key_frame: bool) -> str:
    extension = "pcd.bin" if channel == LIDAR else "jpg"
    log = f"{VEHICLE}-{seed}-{scene:04d}"
    folder = "samples" if key_frame else "sweeps"
    return f"{folder}/{channel}/{log}__{channel}__{microseconds(scene, t)}.{extension}"


def depth_name(image: str) -> str:
    """Where the depth of `samples/CAM_X/name.jpg` is: `depth/CAM_X/name.png`."""
    return "depth/" + image.split("/", 1)[1].removesuffix(".jpg") + ".png"


class Tables:
    """Builds the rows, scene by scene; `rows[table]` is what is written to `table.json`."""

    def __init__(self, seed: int, cameras: list[Camera], samples: int, period: float, sweeps: int):
        self.seed, self.cameras, self.samples, self.period, self.sweeps = seed, cameras, samples, period, sweeps
        self.token = partial(make_token, seed)
        token = self.token
        named = {"category": CATEGORIES, "attribute": ATTRIBUTES}
        self.rows = {
            table: [{"token": token(table, name), "name": name, "description": ""} for name in names]
            for table, names in named.items()
        }
        self.rows["visibility"] = [
            {"token": name, "level": level, "description": f"{level[1:].replace('-', ' to ')} % of its pixels are seen"}
            for name, level, _ in LEVELS
        ]
        self.rows["sensor"] = [
            {"token": token("sensor", name), "channel": name, "modality": "lidar" if name == LIDAR else "camera"}
            for name in [camera.name for camera in cameras] + [LIDAR]
        ]
        for table in ("calibrated_sensor", "ego_pose", "instance", "log", "map", "sample", "sample_annotation"):
            self.rows[table] = []
        self.rows.update(sample_data=[], scene=[])

    def add_map(self, place: int, scenes: list[int]):
        name = self.token("map", place)
        logs = [self.token("log", index) for index in scenes]
        self.rows["map"].append(
            {"token": name, "category": "semantic_prior", "filename": f"maps/{name}.png", "log_tokens": logs}
        )

    def add_scene(self, scene: Scene, counts: list[dict]):
        """Adds a scene; `counts[k]` has `lidar`, `visible` and `alone` for each actor at sample k."""
        index, token = scene.index, self.token
        self.rows["log"].append(
            {
                "token": token("log", index),
                "logfile": f"{VEHICLE}-{self.seed}-{index:04d}",
                "vehicle": VEHICLE,
                "date_captured": "2020-09-13",
                "location": PLACES[scene.place],
                "town": scene.town_name,
            }
        )
        names = [token("sample", (index, k)) for k in range(self.samples)]
        self.rows["scene"].append(
            {
                "token": token("scene", index),
                "log_token": token("log", index),
                "nbr_samples": self.samples,
                "first_sample_token": names[0],
                "last_sample_token": names[-1],
                "name": scene_name(index),
                "description": f"Generated drive {index} through town {scene.town_name}",
            }
        )
        rows = [
            {"token": name, "timestamp": microseconds(index, k * self.period), "scene_token": token("scene", index)}
            for k, name in enumerate(names)
        ]
        self.rows["sample"] += _chain(rows)
        self._add_calibration(index)
        self._add_sample_data(scene, names)
        self._add_annotations(scene, names, counts)

    def _add_calibration(self, index):
        mounted = [(camera.name, camera.ego_T_cam, camera.intrinsics.tolist()) for camera in self.cameras]
        for name, ego_T_sensor, intrinsics in [*mounted, (LIDAR, EGO_T_LIDAR, [])]:
            self.rows["calibrated_sensor"].append(
                {
                    "token": self.token("calibrated_sensor", (index, name)),
                    "sensor_token": self.token("sensor", name),
                    **_pose(ego_T_sensor),
                    "camera_intrinsic": intrinsics,
                }
            )

    def _add_sample_data(self, scene, names):
        index, by_channel = scene.index, {}
        sizes = {camera.name: (camera.width, camera.height) for camera in self.cameras}
        for k, channel, t, key_frame in shots(self.cameras, self.samples, self.period, self.sweeps):
            time = microseconds(index, t)
            name = self.token("sample_data", (index, channel, time))
            width, height = sizes.get(channel, (0, 0))
            self.rows["ego_pose"].append({"token": name, "timestamp": time, **_pose(scene.ego_pose(t))})
            by_channel.setdefault(channel, []).append(
                {
                    "token": name,
                    "sample_token": names[k],
                    "ego_pose_token": name,
                    "calibrated_sensor_token": self.token("calibrated_sensor", (index, channel)),
                    "timestamp": time,
                    "fileformat": "pcd" if channel == LIDAR else "jpg",
                    "is_key_frame": key_frame,
                    "height": height,
                    "width": width,
                    "filename": file_name(self.seed, index, channel, t, key_frame),
                }
            )
        for rows in by_channel.values():
            self.rows["sample_data"] += _chain(rows)

    def _add_annotations(self, scene, names, counts):
        """An actor is annotated from the first sample that sees it to the last, so boxes without points occur."""
        index, token = scene.index, self.token
        for number, actor in enumerate(scene.actors):
            seen = [
                k
                for k, count in enumerate(counts)
                if count["lidar"][number] + count["visible"][number] > 0 and near(scene, actor, k * self.period)
            ]
            if not seen:
                continue
            rows = []
            for k in range(seen[0], seen[-1] + 1):
                attribute = actor.attribute(k * self.period)
                rows.append(
                    {
                        "token": token("sample_annotation", (index, number, k)),
                        "sample_token": names[k],
                        "instance_token": token("instance", (index, number)),
                        "visibility_token": _visibility(counts[k]["visible"][number], counts[k]["alone"][number]),
                        "attribute_tokens": [token("attribute", attribute)] if attribute else [],
                        **box_of(actor, k * self.period),
                        "num_lidar_pts": int(counts[k]["lidar"][number]),
                        "num_radar_pts": 0,
                    }
                )
            self.rows["sample_annotation"] += _chain(rows)
            self.rows["instance"].append(
                {
                    "token": token("instance", (index, number)),
                    "category_token": token("category", actor.category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )


def _visibility(visible, alone) -> str:
    share = visible / alone if alone else 0.0
    return next(name for name, _, bound in LEVELS if share < bound)


def _pose(transform: np.ndarray) -> dict:
    return {"translation": transform[:3, 3].tolist(), "rotation": to_quaternion(transform[:3, :3])}


def _chain(rows: list[dict]) -> list[dict]:
    """Links rows in the order given through `prev` and `next`."""
    for i, row in enumerate(rows):
        row["prev"] = rows[i - 1]["token"] if i else ""
        row["next"] = rows[i + 1]["token"] if i + 1 < len(rows) else ""
    return rows
