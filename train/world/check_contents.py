"""Rules that need the files opened: boxes, solids, LiDAR and depth agree with one another."""

import json
from collections import defaultdict

import numpy as np
from shapely import Polygon, contains_xy, prepare, unary_union

from ...modules.poses import inverse
from .sensors import LIDAR, points_inside, read_depth
from .tables import depth_name

NEARBY = 12.0  # metres within which a passing vehicle may fill a picture
CLEAR, CLOSE = 0.3, 60.0  # metres above the ground from which, and from the vehicle to which, every return is explained


def check_contents(checker) -> None:
    """Adds complaints about scans and depth to those of a `WorldChecker`.

    Every return from above the ground comes from an annotated box or a solid of the map, as many from each box as the
    table says, and the pictures' depth is that of the returns.
    """
    boxes = defaultdict(list)
    for row in checker.tables["sample_annotation"]:
        boxes[row["sample_token"]].append(row)
    solids = _Solids(checker)
    for sample in checker.tables["sample"]:
        frames = checker.key_frames[sample["token"]]
        points = np.fromfile(checker.root / frames[LIDAR]["filename"], dtype=np.float32).reshape(-1, 5)[:, :3].T
        points = np.ascontiguousarray(points)
        world_T_lidar = checker.world_T_sensor(frames[LIDAR])
        world = world_T_lidar[:3, :3] @ points + world_T_lidar[:3, 3:]
        explained = (world[2] < CLEAR) | (np.hypot(points[0], points[1]) > CLOSE)
        lasting = np.ones(points.shape[1], dtype=bool)  # what is still there when the cameras expose
        for row in boxes[sample["token"]]:
            found = points_inside(points, world_T_lidar, row)
            explained[found] = True
            lasting[found] &= _stands(checker, row)
            if len(found) != row["num_lidar_pts"]:
                what = f"the scan has {len(found)} points in it, the table says {row['num_lidar_pts']}"
                checker.complain("LiDAR counts", f"sample_annotation {row['token']}: {what}")
        left = world[:, ~explained]
        strange = left[:, ~solids.contain(sample, left)]
        if strange.shape[1] > 3:
            x, y, z = strange[:, 0]
            what = f"{strange.shape[1]} returns come from no box and no solid, one from ({x:.1f}, {y:.1f}, {z:.1f})"
            checker.complain("boxes", f"sample {sample['token']}: {what}")
        for channel, row in frames.items():
            if channel != LIDAR:
                _check_depth(checker, row, world[:, lasting])


class _Solids:
    """The outlines of what stands in each scene's town."""

    def __init__(self, checker):
        self.checker, self.areas = checker, {}

    def contain(self, sample, points) -> np.ndarray:
        scene = self.checker.by_token["scene"][sample["scene_token"]]
        log = self.checker.by_token["log"][scene["log_token"]]
        if log["town"] not in self.areas:
            path = self.checker.root / "maps" / "markings" / f"{log['location']}.json"
            rows = [row for row in json.loads(path.read_text())["solids"] if row["town"] == log["town"]]
            self.areas[log["town"]] = unary_union([Polygon(row["outline"]) for row in rows]).buffer(0.05)
            prepare(self.areas[log["town"]])
        return contains_xy(self.areas[log["town"]], points[0], points[1])


def _stands(checker, row) -> bool:
    rows = checker.by_token["sample_annotation"]
    around = [rows.get(row[side], row)["translation"] for side in ("prev", "next")]
    return bool(np.linalg.norm(np.subtract(*around)) < 0.01)


def _check_depth(checker, row, world):
    """Where the LiDAR met a surface, a picture shows that surface or something nearer that hides it."""
    calibration = checker.by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
    cam_T_world = inverse(checker.world_T_sensor(row))
    x, y, z = cam_T_world[:3, :3] @ world + cam_T_world[:3, 3:]
    ahead = z > 1.0
    projected = np.array(calibration["camera_intrinsic"]) @ np.stack([x, y, z])[:, ahead]
    u, v = np.rint(projected[:2] / projected[2]).astype(int)
    depth = read_depth(checker.root / depth_name(row["filename"]))
    depth[depth == 0] = np.inf
    inside = (u > 0) & (v > 0) & (u < depth.shape[1] - 1) & (v < depth.shape[0] - 1)
    u, v, z = u[inside], v[inside], z[ahead][inside]
    if len(z) < 100:
        return
    # Half a pixel matters most on the road far ahead, where a row of pixels is metres deep.
    slack = 0.1 + 0.6 * z**2 / calibration["camera_intrinsic"][1][1]
    around = np.min([depth[v + dv, u + du] for dv in (-1, 0, 1) for du in (-1, 0, 1)], axis=0)
    # A vehicle that passes close by may hide everything from a camera, and nothing from the LiDAR a moment before.
    open_view = (depth[v, u] > z - slack) | (depth[v, u] > NEARBY)
    u, v, z, slack, around = u[open_view], v[open_view], z[open_view], slack[open_view], around[open_view]
    if len(z) < 100:
        return
    farther, equal = (around > z + slack).mean(), (np.abs(depth[v, u] - z) < slack).mean()
    if farther > 0.02 or equal < 0.5:
        what = f"{equal:.0%} of the LiDAR points in it are as deep as it says, {farther:.0%} are seen through"
        checker.complain("depth", f"{row['filename']}: {what}")
