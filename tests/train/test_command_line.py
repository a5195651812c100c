"""What every command shares."""

import io
import sys

import pytest

from rigfuse.train.command_line import (
    Parser,
    ProgressDisplay,
    TextTable,
    UsageError,
    check_new,
    choose,
    duration,
    in_one_line,
    new_folder,
)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--colour", "x"], "tool: unknown option --colour; did you mean '--color'?\n"),
        (["--color"], "tool: argument --color: expected one argument\n"),
    ],
)
def test_a_mistaken_option_is_one_line_that_names_the_nearest(given, said, capsys):
    parser = Parser("Paints.\n\nMore about it.", prog="tool")
    parser.add_argument("--color")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    assert capsys.readouterr().err == said
    assert parser.description == "Paints." and "More about it." in parser.format_help()


def test_a_choice_is_named_or_refused():
    assert choose("colour", "red", {"red": 1, "blue": 2}) == "red"
    with pytest.raises(UsageError, match="no colour 'rad'; did you mean 'red'?"):
        choose("colour", "rad", ["red", "blue"])
    with pytest.raises(UsageError, match="no colour 'xyz'; there are red, blue"):
        choose("colour", "xyz", ["red", "blue"])


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UsageError("no such thing"), 2, "tool: no such thing\n"),
        (OSError("disk full\nand more"), 1, "tool: disk full\n"),
        (ValueError(""), 1, "tool: ValueError\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, said, capsys):
    with pytest.raises(SystemExit) as ended, in_one_line("tool", OSError, ValueError):
        raise error
    assert ended.value.code == status and capsys.readouterr().err == said
    with pytest.raises(KeyError), in_one_line("tool", OSError):
        raise KeyError("a fault of ours keeps its traceback")


def test_a_folder_is_new_whole_or_not_there(tmp_path):
    out = tmp_path / "runs" / "out"
    with new_folder(check_new("--out", out)) as folder:
        (folder / "report.md").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["report.md"]
    with pytest.raises(UsageError, match="--out .*out: exists already; choose a new folder"):
        check_new("--out", out)
    with pytest.raises(ZeroDivisionError), new_folder(out.with_name("other")) as folder:
        (folder / "report.md").touch()
        raise ZeroDivisionError
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (empty := tmp_path / "empty").mkdir()
    with new_folder(check_new("--out", empty)) as folder:
        (folder / "report.md").touch()
    assert (empty / "report.md").exists()


def test_a_table_is_aligned_and_escaped_in_markdown():
    table = TextTable("Sizes", ["name", "size"], left=1, rows=[["a|b", "1"]], note="A note.")
    assert table.markdown() == "## Sizes\n\n| name | size |\n| --- | ---: |\n| a\\|b | 1 |\n\nA note.\n"
    assert table.markdown(heading=False).startswith("| name")


def test_the_time_left_follows_from_the_share_that_is_done():
    now = [100.0]
    shown = ProgressDisplay(clock=lambda: now[0])
    assert shown.line() == "0%, just begun: "
    now[0] = 130.0
    shown.update(3, 12, "the third of twelve")
    assert shown.line() == "25%, about 90 s left: the third of twelve".replace("90 s", "1 min 30 s")
    now[0] = 220.0
    shown.update(12, 12, "")
    assert "0 s left" in shown.line()


@pytest.mark.parametrize(
    "seconds, said", [(-3, "0 s"), (89.4, "89 s"), (200, "3 min 20 s"), (3000, "50 min"), (7500, "2 h 5 min")]
)
def test_durations_are_said_as_a_person_says_them(seconds, said):
    assert duration(seconds) == said


def test_without_a_terminal_a_line_shows_life(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with ProgressDisplay(every=0.01) as shown:
        shown.update(1, 4, "something long")
        for _ in range(1000):
            if "something long" in written.getvalue():
                break
            shown._ended.wait(0.01)
        shown.say("a row")
    lines = written.getvalue().splitlines()
    assert any(line.endswith("left: something long") for line in lines) and "a row" not in written.getvalue()
