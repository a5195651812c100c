"""What a world holds, counted from its files."""

import json
from collections import Counter
from pathlib import Path

LONG = 6.0  # seconds that a future lasts
ELEMENTS = ("lane", "lane_connector", "road_divider", "lane_divider", "ped_crossing", "stop_line", "traffic_light")


def summarise(root: Path, version: str, future: float = LONG) -> dict:
    """Counts of scenes, samples, boxes by category, futures, map elements and markings; plain JSON.

    Args:
        root: the world's folder.
        version: the folder in it with the tables.
        future: seconds that a box has to be followed on for its future to count.
    """
    read = {
        name: json.loads((root / version / f"{name}.json").read_text())
        for name in ("scene", "sample", "sample_annotation", "instance", "category", "log", "splits")
    }
    by_token = {name: {row["token"]: row for row in read[name]} for name in ("instance", "category", "sample")}
    boxes, futures = Counter(), 0
    times = {token: row["timestamp"] for token, row in by_token["sample"].items()}
    last = {row["instance_token"]: 0 for row in read["sample_annotation"]}
    for row in read["sample_annotation"]:
        last[row["instance_token"]] = max(last[row["instance_token"]], times[row["sample_token"]])
    for row in read["sample_annotation"]:
        instance = by_token["instance"][row["instance_token"]]
        boxes[by_token["category"][instance["category_token"]]["name"]] += 1
        futures += last[row["instance_token"]] - times[row["sample_token"]] >= future * 1e6 - 1
    elements, markings = Counter(), Counter()
    for path in sorted((root / "maps" / "expansion").glob("*.json")):
        content = json.loads(path.read_text())
        elements.update({name: len(content[name]) for name in ELEMENTS})
    for path in sorted((root / "maps" / "markings").glob("*.json")):
        content = json.loads(path.read_text())
        markings.update(row["type"] for row in content["lines"])
        markings.update({name: len(rows) for name, rows in content.items() if name not in ("version", "lines")})
    return {
        "scenes": len(read["scene"]),
        "samples": len(read["sample"]),
        "splits": {name: len(names) for name, names in read["splits"].items()},
        "towns": sorted(row["town"] for row in read["log"]),
        "boxes": dict(boxes.most_common()),
        "boxes_with_future": futures,
        "map_elements": dict(elements),
        "markings": dict(sorted(markings.items())),
    }


def describe(summary: dict) -> str:
    """A summary in a few readable lines."""
    boxes = summary["boxes"]
    total = sum(boxes.values())
    splits = ", ".join(f"{count} {name}" for name, count in summary["splits"].items())
    lines = [
        f"{summary['scenes']} scenes ({splits}), {summary['samples']} samples, a town for each scene",
        f"{total} boxes, {summary['boxes_with_future']} of them with the {LONG:.0f} s that follow",
    ]
    lines += [f"  {count:7d}  {100 * count / total:5.1f} %  {name}" for name, count in boxes.items()]
    for title, counts in (("map", summary["map_elements"]), ("markings", summary["markings"])):
        lines.append(f"{title}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return "\n".join(lines)
