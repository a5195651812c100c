"""What `draw_over` refuses: in one line, before anything is written."""

import pytest

from rigfuse.train.tools.make_world import main
from support.roots import copy_root, edit, read_table


@pytest.fixture
def root(small_world, tmp_path):
    return copy_root(small_world, tmp_path / "root")


def refused(capsys, root, *arguments):
    out = root.parent / "out"
    assert main(["--over", str(root), "--out", str(out), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and sorted(path.name for path in root.parent.iterdir()) == ["root"]
    return message


def test_a_root_with_every_picture_says_so(root, capsys):
    assert "has every picture; there is nothing to draw" in refused(capsys, root)
    first = next(row for row in read_table(root, "sample_data") if row["fileformat"] == "jpg")
    (root / first["filename"]).unlink()
    name = read_table(root, "scene")[1]["name"]
    assert "has every picture of those asked for; there is nothing to draw" in refused(capsys, root, "--only", name)


@pytest.mark.parametrize(
    "table, field, value",
    [
        ("log", "location", "../../../outside"),
        ("scene", "name", "../outside"),
        ("sample_data", "filename", "samples/../../outside.jpg"),
        ("sample", "next", "nobody"),
        ("ego_pose", "translation", [float("nan")] * 3),
    ],
)
def test_tables_that_lead_outside_or_nowhere(root, capsys, table, field, value):
    token = read_table(root, table)[0]["token"]
    edit(root, table, lambda rows: rows[0].update({field: value}))
    assert f": {table} {token}: {field} is " in refused(capsys, root)


@pytest.mark.parametrize("name", ["picture.jpg", "pictures/CAM_FRONT/1.jpg", ".", "samples/1.jpg"])
def test_pictures_that_lie_elsewhere(root, capsys, name):
    rows = read_table(root, "sample_data")
    number = next(i for i, row in enumerate(rows) if row["fileformat"] == "jpg")
    edit(root, "sample_data", lambda rows: rows[number].update(filename=name))
    token = rows[number]["token"]
    assert f"sample_data {token}: filename is '{name}', needs samples/CAMERA/NAME" in refused(capsys, root)
