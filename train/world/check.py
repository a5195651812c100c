"""Whether a generated world keeps the rules of its format, and whether its pictures, depth, LiDAR and boxes agree."""

import json
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ...modules.poses import from_row
from .check_contents import check_contents
from .check_maps import check_maps
from .tables import PLACES, depth_name

LINKS = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {
        "category_token": "category",
        "first_annotation_token": "sample_annotation",
        "last_annotation_token": "sample_annotation",
    },
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
        "next": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "visibility_token": "visibility",
        "attribute_tokens": "attribute",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
    "map": {"log_tokens": "log"},
}
TABLES = (*LINKS, "attribute", "category", "ego_pose", "log", "sensor", "visibility")
ATTRIBUTE_OF = {"vehicle.bicycle": "cycle", "vehicle.motorcycle": "cycle", "vehicle": "vehicle", "human": "pedestrian"}
SHOWN = 3  # complaints a rule may make
FASTEST = 40.0  # m/s
CREEPING, STRAIGHT = 0.01, 0.8  # m/s below which nothing moves; cosine of the largest angle to its way


class WorldChecker:
    """Collects complaints, each beginning with the name of the rule that is broken."""

    def __init__(self, root: Path):
        self.root = root
        self.complaints = defaultdict(list)
        versions = [path.parent for path in root.glob("*/sample.json")]
        self.folder = versions[0] if len(versions) == 1 else None
        self.tables, self.by_token = {}, {}

    def complain(self, rule: str, what: str):
        self.complaints[rule].append(what)

    def report(self) -> list[str]:
        lines = []
        for rule, found in self.complaints.items():
            lines += [f"{rule}: {what}" for what in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"{rule}: and {len(found) - SHOWN} more")
        return lines

    def read_tables(self) -> bool:
        if self.folder is None:
            self.complain("tables", f"{self.root} has no folder with tables, or several")
            return False
        for table in TABLES:
            path = self.folder / f"{table}.json"
            try:
                rows = self.tables[table] = json.loads(path.read_text())
                self.by_token[table] = {row["token"]: row for row in rows}
            except (OSError, ValueError, TypeError, KeyError) as error:
                self.complain("tables", f"{path.name} cannot be read: {type(error).__name__}: {error}")
                continue
            if len(self.by_token[table]) != len(rows):
                self.complain("unique tokens", f"{path.name} repeats {len(rows) - len(self.by_token[table])} tokens")
        return not self.complaints

    def check_links(self) -> bool:
        for table, links in LINKS.items():
            for row in self.tables[table]:
                for field, target in links.items():
                    tokens = row[field] if isinstance(row[field], list) else [row[field]]
                    for token in tokens:
                        is_end = field in ("prev", "next") and token == ""
                        if not is_end and token not in self.by_token[target]:
                            self.complain("foreign keys", f"{table} {row['token']}: no {target} is {token!r} ({field})")
        return not self.complaints

    def check_chains(self) -> bool:
        for table in ("sample", "sample_data", "sample_annotation"):
            rows = self.by_token[table]
            for row in rows.values():
                if row["next"] and rows[row["next"]]["prev"] != row["token"]:
                    self.complain("chains", f"{table} {row['token']}: the prev of its next is another row")
                if row["prev"] and rows[row["prev"]]["next"] != row["token"]:
                    self.complain("chains", f"{table} {row['token']}: the next of its prev is another row")
        counted = (("scene", "sample", "nbr_samples"), ("instance", "sample_annotation", "nbr_annotations"))
        for table, member, count in counted:
            kind = member.removeprefix("sample_")
            for row in self.tables[table]:
                length, last = 0, row[f"first_{kind}_token"]
                while length <= row[count]:
                    length += 1
                    following = self.by_token[member][last]["next"]
                    if not following:
                        break
                    last = following
                if length != row[count] or last != row[f"last_{kind}_token"]:
                    self.complain("chains", f"{table} {row['token']}: its chain has not the length and the end it says")
        return not self.complaints

    def check_times(self) -> bool:
        for table in ("sample", "sample_data"):
            rows = self.by_token[table]
            for row in rows.values():
                if row["next"] and rows[row["next"]]["timestamp"] <= row["timestamp"]:
                    self.complain("times increase", f"{table} {row['token']}: the next one is not later")
        for row in self.tables["sample_data"]:
            if self.by_token["ego_pose"][row["ego_pose_token"]]["timestamp"] != row["timestamp"]:
                self.complain("pose times", f"sample_data {row['token']}: its ego pose is of another time")
            apart = abs(row["timestamp"] - self.by_token["sample"][row["sample_token"]]["timestamp"])
            if row["is_key_frame"] and apart > 100_000:
                self.complain("key frame times", f"sample_data {row['token']} is {apart / 1e6} s from its sample")
        return not self.complaints

    def world_T_sensor(self, row) -> np.ndarray:
        """(4, 4) pose of the sensor of a row of sample_data."""
        calibration = self.by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
        return from_row(self.by_token["ego_pose"][row["ego_pose_token"]]) @ from_row(calibration)

    def channel(self, row) -> str:
        calibration = self.by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
        return self.by_token["sensor"][calibration["sensor_token"]]["channel"]

    def check_key_frames(self):
        """Every sample has one key frame of every sensor."""
        self.key_frames = defaultdict(dict)
        for row in self.tables["sample_data"]:
            if row["is_key_frame"]:
                frames = self.key_frames[row["sample_token"]]
                if self.channel(row) in frames:
                    self.complain("key frames", f"sample {row['sample_token']} has two of {self.channel(row)}")
                frames[self.channel(row)] = row
        for sample in self.by_token["sample"]:
            for sensor in self.tables["sensor"]:
                if sensor["channel"] not in self.key_frames[sample]:
                    self.complain("key frames", f"sample {sample} has none of {sensor['channel']}")

    def check_geometry(self):
        for table in ("calibrated_sensor", "ego_pose", "sample_annotation"):
            for row in self.tables[table]:
                if not abs(np.linalg.norm(row["rotation"]) - 1) < 1e-6:
                    self.complain("unit quaternions", f"{table} {row['token']}: {row['rotation']}")
                if not np.isfinite(row["translation"]).all():
                    self.complain("finite numbers", f"{table} {row['token']}: {row['translation']}")
        for row in self.tables["sample_annotation"]:
            if not min(row["size"]) > 0:
                self.complain("box sizes", f"sample_annotation {row['token']}: {row['size']}")
        for row in self.tables["sample_data"]:
            calibration = self.by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
            if row["fileformat"] == "jpg":
                (fx, _, cx), (_, fy, cy), _ = calibration["camera_intrinsic"]
                if not (fx > 0 and fy > 0 and 0 < cx < row["width"] and 0 < cy < row["height"]):
                    self.complain("intrinsics", f"calibrated_sensor {calibration['token']} does not fit its pictures")

    def check_motion(self):
        """Boxes move as their attributes say, no faster than a vehicle can, and vehicles the way they head."""
        names = {token: row["name"] for token, row in self.by_token["attribute"].items()}
        for row in self.tables["sample_annotation"]:
            instance = self.by_token["instance"][row["instance_token"]]
            category = self.by_token["category"][instance["category_token"]]["name"]
            wanted = next((kind for prefix, kind in ATTRIBUTE_OF.items() if category.startswith(prefix)), None)
            given = [names[token] for token in row["attribute_tokens"]]
            if len(given) != (wanted is not None) or any(name.split(".")[0] != wanted for name in given):
                self.complain("attributes", f"sample_annotation {row['token']}: {category} with {given}")
                continue
            self._check_displacement(row, category, given[0].split(".")[1] if given else "")

    def _check_displacement(self, row, category, attribute):
        rows, samples = self.by_token["sample_annotation"], self.by_token["sample"]
        before, after = rows.get(row["prev"], row), rows.get(row["next"], row)
        if before is after:
            return
        times = [samples[end["sample_token"]]["timestamp"] for end in (before, after)]
        way = np.subtract(after["translation"], before["translation"])
        speed = np.linalg.norm(way) / ((times[1] - times[0]) / 1e6)
        # Between two samples a vehicle may brake from some speed to none; one that stands has not come from afar.
        slowest = CREEPING if attribute == "moving" else 0.0
        fastest = {"parked": 0.1, "without_rider": 0.1, "stopped": 4.0, "standing": 2.0}.get(attribute, FASTEST)
        if category.startswith(("movable_object", "static_object")):
            fastest = 0.1
        if not slowest <= speed <= fastest:
            self.complain("velocities", f"sample_annotation {row['token']}: {category} {attribute} at {speed:.1f} m/s")
        yaw = 2 * np.arctan2(row["rotation"][3], row["rotation"][0])
        if (
            category.startswith("vehicle")
            and speed > 3
            and way[:2] @ [np.cos(yaw), np.sin(yaw)] < STRAIGHT * np.linalg.norm(way)
        ):
            self.complain("headings", f"sample_annotation {row['token']}: {category} does not go where it heads")

    def path(self, name) -> Path | None:
        """A file of the world; None, with a complaint, where it is absent or outside the folder."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            self.complain("files", f"{name} leaves the folder")
        elif not (self.root / pure).is_file():
            self.complain("files", f"{name} is missing")
        else:
            return self.root / pure
        return None

    def check_files(self):
        for row in self.tables["sample_data"]:
            path = self.path(row["filename"])
            if row["fileformat"] == "jpg":
                for file in (path, self.path(depth_name(row["filename"]))):
                    self._check_picture(row, file)
            elif path and path.stat().st_size % 20:
                self.complain("LiDAR files", f"{row['filename']} is not rows of five float32")
        for row in self.tables["map"]:
            self.path(row["filename"])
        mapped = {token for row in self.tables["map"] for token in row["log_tokens"]}
        for row in self.tables["log"]:
            if row["token"] not in mapped:
                self.complain("maps", f"log {row['token']} has no map")
            if row["location"] not in PLACES:
                self.complain("maps", f"log {row['token']}: the devkit knows no {row['location']!r}")
            for folder in ("expansion", "markings"):
                self.path(f"maps/{folder}/{row['location']}.json")

    def _check_picture(self, row, file):
        if file is None:
            return
        try:
            with Image.open(file) as image:
                size = image.size
        except OSError:
            self.complain("pictures", f"{file.name} cannot be opened")
            return
        if size != (row["width"], row["height"]):
            self.complain("picture sizes", f"{file.name} is {size[0]}×{size[1]}, the table says otherwise")

    def check_splits(self):
        try:
            splits = json.loads((self.folder / "splits.json").read_text())
        except (OSError, ValueError) as error:
            self.complain("splits", f"splits.json cannot be read: {error}")
            return
        scenes = {row["name"]: self.by_token["log"][row["log_token"]] for row in self.tables["scene"]}
        unknown = {name for names in splits.values() for name in names} - set(scenes)
        if unknown:
            self.complain("splits", f"no scene is {sorted(unknown)[0]!r}")
        if set(splits.get("world_train", ())) & set(splits.get("world_val", ())):
            self.complain("splits", "a scene is in world_train and in world_val")
        for field in ("town", "location"):
            trained, validated = (
                {scenes[name].get(field) for name in splits.get(split, ()) if name in scenes}
                for split in ("world_train", "world_val")
            )
            if trained & validated:
                what = f"world_train and world_val share the {field} {sorted(map(str, trained & validated))[0]!r}"
                self.complain("towns", what)


def check_world(root: str | Path) -> list[str]:
    """What is wrong with a world that `make_world` wrote; nothing when the list is empty.

    Args:
        root: the world's folder.

    Returns:
        Lines that begin with the name of the rule that is broken, at most three and a count for each rule.
    """
    checker = WorldChecker(Path(root))
    # What comes later relies on what was checked before it.
    if checker.read_tables() and checker.check_links() and checker.check_chains() and checker.check_times():
        checker.check_key_frames()
        checker.check_geometry()
        checker.check_motion()
        checker.check_files()
        checker.check_splits()
        check_maps(checker)
        if not checker.complaints:
            check_contents(checker)
    return checker.report()
