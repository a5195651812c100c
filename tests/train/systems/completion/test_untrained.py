"""Fillings without training: what they are compared by, and that the command shows them."""

import pytest
import torch
import torch.nn.functional as F

from rigfuse.train.data import open_drives
from rigfuse.train.systems.completion.untrained import FILLINGS, fill, tables
from rigfuse.train.tools import compare_fillings


def colours(images, *strides):
    """Sixteen mixtures of the three colours, averaged over cells."""
    mix = torch.randn(16, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return [F.conv2d(F.avg_pool2d(images.float(), s, ceil_mode=True), mix) for s in strides or (8,)]


def test_every_camera_is_dropped_at_every_moment_with_a_past(small_world):
    drives = open_drives(small_world)
    (result,) = fill(drives, colours, (8,), (32, 64))
    assert len(result.cameras) == 6 and result.samples == sum(len(drive) - 1 for drive in drives)
    assert {filling for filling, _ in result.errors} == set(FILLINGS)
    assert result.mean("zeros") == pytest.approx(1)
    for filling in ("own", "missing"):
        assert result.mean(filling) < result.mean("zeros")
    (rows,) = tables([result])
    assert rows[0] == ["stride 8", *FILLINGS] and [row[0] for row in rows[1:]] == [*result.cameras, "mean"]
    assert rows[-1][1] == "1.000" and rows[1][2] == f"{result.mean('copy', result.cameras[0]):.3f}"


def test_moments_too_far_apart_are_no_past(small_world):
    with pytest.raises(ValueError, match="no two consecutive moments have all their images"):
        fill(open_drives(small_world), colours, (8,), (32, 64), max_gap=0.1)


def test_real_images_of_other_rigs(ddad):
    """Three frames; what moved comes nearer to the truth than what was."""
    (result,) = fill(ddad, lambda images: colours(images, 32), (32,), (96, 160))
    assert result.samples == 2 and result.mean("own") < result.mean("copy") < 1
    assert result.mean("missing") < 1


def test_the_command_shows_a_table_for_each_stride(small_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_fillings, "backbone_of", lambda _: lambda images: colours(images, 8, 16, 32))
    assert compare_fillings.main(["--data", str(small_world), "--size", "32", "64"]) == 0
    shown = capsys.readouterr().out
    assert [f"| stride {s} |" in shown for s in (8, 16, 32)] == [True] * 3 and "4 moments of each camera" in shown
    monkeypatch.undo()
    torch.save(dict(model={}), tmp_path / "empty.pt")
    with pytest.raises(SystemExit):
        compare_fillings.main(["--data", str(small_world), "--backbone", str(tmp_path / "empty.pt")])
    assert "has no backbone" in capsys.readouterr().err
