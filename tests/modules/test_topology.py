"""Who attends to whom, by name."""

import pytest

from rigfuse.modules.drawing import draw_rig
from rigfuse.modules.rig import NUSCENES_CAMERAS, Rig, nuscenes_like_rig
from rigfuse.modules.topology import TOPOLOGIES, Topology, view_overlap

UPSTREAM_ORDER = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


def test_tables_in_the_documents_order():
    table = Topology.named("neighbours").table(NUSCENES_CAMERAS)
    assert table.tolist() == [[0, 1, 2], [1, 0, 3], [2, 0, 4], [3, 1, 5], [4, 2, 5], [5, 3, 4]]
    assert Topology.named("own").table(NUSCENES_CAMERAS).tolist() == [[i] for i in range(6)]
    assert Topology.named("global").table(NUSCENES_CAMERAS).tolist() == [list(range(6))] * 6


def test_another_order_of_cameras_gives_the_same_names():
    topology = Topology.named("neighbours", UPSTREAM_ORDER)
    for camera, row in zip(UPSTREAM_ORDER, topology.table(UPSTREAM_ORDER).tolist()):
        assert tuple(UPSTREAM_ORDER[i] for i in row) == Topology.named("neighbours").attends[camera]


def test_rows_of_different_length_are_filled_up():
    topology = Topology({"A": ("A", "B"), "B": (), "C": ["C"]})
    assert topology.table(("C", "A", "B")).tolist() == [[0, -1], [1, 2], [-1, -1]]
    two = ("CAM_FRONT", "CAM_BACK")
    assert Topology.named("neighbours", two).table(two).tolist() == [[0], [1]]


def test_overlapping_views_are_the_documents_neighbours():
    rig = nuscenes_like_rig()
    assert Topology.from_calibration(rig) == Topology.named("neighbours")
    turned_round = Rig(rig.cameras[::-1])
    found = Topology.from_calibration(turned_round).attends
    assert {c: set(o) for c, o in found.items()} == {c: set(o) for c, o in Topology.named("neighbours").attends.items()}


def test_the_criterion_has_room_on_both_sides():
    rig = nuscenes_like_rig()
    overlap = view_overlap(rig)
    table = Topology.named("neighbours").table(rig.names)
    for i in range(6):
        for j in range(6):
            if j in table[i]:
                assert overlap[i, j] > 0.03
            else:
                assert overlap[i, j] == 0
    between = (overlap[5, 3] + overlap[3, 5]) / 2  # of the two fractions of a pair the larger one counts
    assert Topology.from_calibration(rig, min_overlap=between) == Topology.named("neighbours")
    assert Topology.from_calibration(rig, min_overlap=0.06).attends["CAM_BACK"] == ("CAM_BACK",)


def test_unknown_names_are_named_with_the_choices():
    with pytest.raises(ValueError, match="no topology 'neighbors'; choose one of " + ", ".join(TOPOLOGIES)):
        Topology.named("neighbors")
    with pytest.raises(ValueError, match="no camera 'LEFT'; choose one of CAM_FRONT"):
        Topology.named("neighbours", ("LEFT",))
    with pytest.raises(ValueError, match="no camera 'C'; choose one of A, B"):
        Topology({"A": ("C",), "B": ()})
    with pytest.raises(ValueError, match="may stand there once"):
        Topology({"A": ("A", "A")})
    with pytest.raises(ValueError, match="no camera 'CAM_TOP'"):
        Topology.named("global").table(("CAM_TOP",))
    with pytest.raises(ValueError, match="no camera 'CAM_FRONT_LEFT'; choose one of CAM_FRONT, CAM_BACK"):
        Topology.named("neighbours").table(("CAM_FRONT", "CAM_BACK"))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draw_rig_writes_a_picture(tmp_path, suffix):
    path = tmp_path / f"rig.{suffix}"
    draw_rig(nuscenes_like_rig(), Topology.named("neighbours"), path, "V2")
    assert path.stat().st_size > 10_000
