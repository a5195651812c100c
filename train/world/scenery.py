"""What stands beside the roads of a town: houses, walls, trees, lamps, signals; and the bumps on them."""

import numpy as np

from ...modules.poses import rotation_z
from .casting import Placed
from .fixtures import billboard, bump_body, lamp_post, signal_post, wall
from .markings import STOP, Markings
from .shapes import building, tree
from .town import TILE, WALKWAY, Road, Town

KERB = 0.8  # metres from the kerb to the trees and lamps beside it
UNDER = 4.1  # metres; nothing that drives or walks is taller


def furnish(town: Town, markings: Markings, rng) -> list[Placed]:
    """Everything that stands in a town and never moves, but for the signals."""
    side = round(np.sqrt(len(town.nodes)))
    parks = rng.random((side - 1, side - 1)) < 0.25
    scenery = [_bump(town, bump) for bump in markings.bumps]
    for road in town.roads:
        for left in (-1, 1):
            scenery += _frontage(town, road, left, _is_park(road, left, parks), rng)
            for s in np.arange(8 + rng.uniform(0, 4), road.length - 8, 13.0):
                point = road.point(s, left * (road.half + KERB))
                if rng.random() < 0.6:
                    kind, body = "tree", tree(*_choice(rng, 10, 12.5))
                    turn = rotation_z(rng.uniform(0, 6.3))
                else:
                    kind, body = "lamp", lamp_post(*_choice(rng, 6.5, 8))
                    turn = rotation_z(road.heading(s) - left * np.pi / 2)
                scenery.append(_stand(kind, body, turn, point, int(rng.integers(2**20))))
    return scenery + _backdrop(town, scenery, rng)


def signal_posts(town: Town) -> list[tuple[int, int, dict[str, Placed]]]:
    """(junction, group, body by state) of the lights beside each stop line of a junction that has them."""
    posts = []
    for number, road in enumerate(town.roads):
        for end, node in enumerate(road.nodes):
            if node not in town.signals:
                continue
            point = post_place(road, end)
            turn = rotation_z(road.heading() + (0 if end == 0 else np.pi))  # faces the traffic
            bodies = {state: _stand("signal", signal_post(state), turn, point) for state in ("green", "yellow", "red")}
            posts.append((node, town.group(number), bodies))
    return posts


def obstacles(scenery: list[Placed]) -> np.ndarray:
    """(N, 5) x, y, heading, width, length of what stands in the way of whoever is lower than `UNDER`."""
    rows = []
    for item in scenery:
        if item.kind == "speed_bump":
            continue
        starts = item.body.vertex_starts
        parts = [item.body.vertices[a:b] for a, b in zip(starts[:-1], starts[1:])]
        low = np.concatenate([part for part in parts if part[:, 2].min() + item.position[2] < UNDER])[:, :2]
        middle = item.rotation[:2, :2] @ (low.min(0) + low.max(0)) / 2 + item.position[:2]
        heading = np.arctan2(item.rotation[1, 0], item.rotation[0, 0])
        rows.append((*middle, heading, *np.ptp(low, axis=0)[::-1]))
    return np.array(rows).reshape(-1, 5)


def post_s(road: Road, end: int) -> float:
    """Where along a road the traffic light of one of its ends stands."""
    return STOP[1] if end == 0 else road.length - STOP[1]


def post_place(road: Road, end: int) -> np.ndarray:
    """(2,) the foot of the traffic light at an end of a road, beside the lanes that lead there."""
    return road.point(post_s(road, end), (1 if end == 0 else -1) * (road.half + 0.6))


def _choice(rng, low, high):
    """A height to half a metre and one of a dozen shapes, so that bodies are made once; their patterns all differ."""
    return float(rng.integers(2 * low, 2 * high + 1)) / 2, int(rng.integers(12))


def _stand(kind, body, turn, point, seed=0) -> Placed:
    return Placed(body, turn, np.array([*point, body.size[2] / 2]), seed=seed, kind=kind)


def _bump(town, bump):
    road = town.roads[bump.road]
    body = bump_body(2 * road.edge, bump.length, bump.height)
    return _stand("speed_bump", body, rotation_z(road.heading(bump.s)), road.point(bump.s, 0.0))


def _is_park(road, side, parks):
    """Whether the block on one side of a road is a park."""
    count = len(parks) + 1
    a, b = np.array(divmod(road.nodes[0], count)), np.array(divmod(road.nodes[1], count))
    across = np.array([-(b - a)[1], (b - a)[0]]) * side
    i, j = np.floor((a + b + across) / 2).astype(int)
    return bool(0 <= i < count - 1 and 0 <= j < count - 1 and parks[i, j])


def _frontage(town, road, side, park, rng):
    """Houses and walls along one side of a road, or the trees of a park."""
    placed, s = [], -4.0
    while s < road.length - 4:
        width = rng.uniform(9, 20) if not park else 7.0
        depth = rng.uniform(9, 14)
        height = rng.uniform(7, 15) if rng.random() < 0.75 else rng.uniform(15, 34)
        gap = rng.uniform(0.3, 1.5) if rng.random() < 0.8 else rng.uniform(4, 8)
        seed = int(rng.integers(2**20))
        is_wall = rng.random() < town.style.walls
        if park:
            kind = "tree" if rng.random() < 0.8 else "billboard"
            body = tree(*_choice(rng, 7, 11)) if kind == "tree" else billboard(5.0, seed)
        elif is_wall:
            kind, depth = "wall", 0.3
            body = wall(width, rng.uniform(0.9, 2.4), seed)
        else:
            kind, body = "building", building(width, depth, height, seed)
        back = 4.5 if park else depth / 2 + (0.5 if is_wall else rng.uniform(0.8, 2.2) + abs(road.bend) * 0.15)
        centre = road.point(s + width / 2, side * (road.half + WALKWAY + back))
        if park:
            centre = centre + rng.uniform(-3, 3, 2)
        turn = rotation_z(road.heading(s + width / 2) - side * np.pi / 2)
        if _is_clear(town, centre, turn, body.size) and not _touches(placed, centre, body.size):
            placed.append(_stand(kind, body, turn, centre, seed))
        s += width + gap
    return placed


def _touches(placed, centre, size):
    """Whether a body would cut into the one before it, which a bend may have turned its way."""
    if not placed:
        return False
    last = placed[-1]
    apart = np.hypot(*(last.position[:2] - centre))
    return apart < 0.5 * (last.body.size[0] + size[0]) - 0.5


def _backdrop(town, scenery, rng):
    """Houses and trees where a street goes on to nothing: at junctions that lack a road."""
    placed, large = [], [item for item in scenery if min(item.body.size[:2]) > 4]
    for node, middle in enumerate(town.nodes):
        used = [road.heading() + (0 if road.nodes[0] == node else np.pi) for road in town.roads if node in road.nodes]
        for quarter in range(4):
            away = quarter * np.pi / 2
            if any(np.cos(away - heading) > 0.7 for heading in used):
                continue
            across = np.array([-np.sin(away), np.cos(away)])
            for offset in (-16.0, 0.0, 16.0):
                seed = int(rng.integers(2**20))
                kind, body = "building", building(15.0, rng.uniform(9, 12), rng.uniform(8, 20), seed)
                if rng.random() < 0.3:
                    kind, body = "tree", tree(*_choice(rng, 7, 11))
                reach = town.style.mouth + WALKWAY + 9
                centre = middle + reach * np.array([np.cos(away), np.sin(away)]) + offset * across
                if _is_clear(town, centre, rotation_z(away), body.size) and _is_apart(
                    large + placed, centre, body.size
                ):
                    placed.append(_stand(kind, body, rotation_z(away), centre, seed))
    return placed


def _is_apart(placed, centre, size):
    apart = np.linalg.norm([item.position[:2] - centre for item in placed], axis=1)
    return bool((apart > 0.5 * (np.hypot(*size[:2]) + [np.hypot(*item.body.size[:2]) for item in placed]) - 4).all())


def _is_clear(town, centre, turn, size):
    """Whether a footprint keeps off every road and its walkways, and on the tile."""
    grid = np.array([(x, y, 0) for x in (-0.5, 0, 0.5) for y in (-0.5, 0, 0.5)]) * [size[1], size[0], 0]
    points = (grid @ turn.T)[:, :2] + centre
    if (np.abs(points - town.nodes.mean(0)) > TILE / 2 - 8).any():
        return False
    reach = np.hypot(*size[:2]) / 2 + WALKWAY + 10
    for road in town.roads:
        offset = points - road.start
        if np.hypot(*(offset.mean(0) - road.along * road.length / 2)) > road.length / 2 + town.style.mouth + reach:
            continue
        s = np.clip(offset @ road.along, -town.style.mouth, road.length + town.style.mouth)
        gap = np.linalg.norm(points - road.point(s, np.zeros(len(s))), axis=1)
        if (gap < road.half + WALKWAY + 0.4).any():
            return False
    return True
