"""What every command shares: mistakes in one line, new folders, tables, and how far a long command is.

A command parses with `Parser`, runs inside `in_one_line`, writes into `new_folder` and shows `TextTable`s on
`console()`. Its exit status: 0 done; 1 it could not be done; 2 the command line is mistaken; 130 interrupted.
"""

import argparse
import difflib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

INTERRUPTED = 130
EVERY = 30.0  # seconds between two lines of progress where there is no terminal


class UsageError(ValueError):
    """A command line asks for something that there is not. The message is one line."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where one of `choices` is near, else the first of them, else nothing."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(choices[:12])}{', …' if len(choices) > 12 else ''}" if choices else ""


def choose(kind: str, given: str, choices: Iterable[str]) -> str:
    """Returns `given` if it is one of `choices`; else raises UsageError with the nearest one."""
    choices = list(choices)
    if given not in choices:
        raise UsageError(f"no {kind} {given!r}{nearest(given, choices)}")
    return given


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, exit status 2.

    Takes a script's docstring: its first line says what the command does, the rest stands below the options in --help.
    """

    def __init__(self, doc: str, **settings):
        about, _, more = doc.partition("\n\n")
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, epilog=more, formatter_class=form, allow_abbrev=False, **settings)

    def error(self, message: str):
        unknown = next((word.split("=")[0] for word in message.split() if word.startswith("--")), None)
        if message.startswith("unrecognized") and unknown:
            message = f"unknown option {unknown}" + nearest(
                unknown, [option for option in self._option_string_actions if option.startswith("--")]
            )
        self.exit(2, f"{self.prog}: {message}\n")


@contextmanager
def patience(what: str, active: bool = True) -> Iterator[None]:
    """Says on stderr what is being done, every half minute for as long as it lasts. For work that cannot be counted."""
    done, began = threading.Event(), time.monotonic()

    def remind():
        while not done.wait(EVERY):
            print(f"{what} … {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    if active:
        threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def in_one_line(name: str, *expected: type[Exception]) -> Iterator[None]:
    """Ends the command `name` with one line on stderr, and no traceback, where the user has something to mend.

    A UsageError ends it with status 2, one of the `expected` exceptions with 1, Ctrl-C with 130.
    """
    try:
        yield
    except (UsageError, *expected) as error:
        print(f"{name}: {_first_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_new(option: str, path: Path) -> Path:
    """Returns `path` if it can become a new folder: it is absent, or an empty folder. Else raises UsageError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{option} {path}: exists already; choose a new folder")
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path` that becomes `path` when all is done; nothing is left where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def console(**settings):
    """rich's Console, 160 columns wide where stdout is not a terminal."""
    from rich.console import Console

    return Console(**dict(width=None if sys.stdout.isatty() else 160, markup=False) | settings)


@dataclass
class TextTable:
    """A table of text for the terminal and for Markdown; the first `left` columns are left-aligned."""

    title: str
    columns: list[str]
    left: int
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def print(self, console) -> None:
        from rich.table import Table

        title = dict(title=self.title, title_justify="left")
        table = Table(**title, caption=self.note or None, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self, heading: bool = True) -> str:
        def line(cells):
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---" if number < self.left else "---:" for number in range(len(self.columns))]
        lines = [line(self.columns), line(rule), *map(line, self.rows)]
        title = f"## {self.title}\n\n" if heading else ""
        return title + "\n".join(lines) + "\n" + (f"\n{self.note}\n" if self.note else "")


class ProgressDisplay:
    """Shows how far a long command is and about how long it still takes.

    On a terminal a bar below the lines that `say` leaves; elsewhere, so that a log shows life, a line every half
    minute. `update(done, total, what)` counts in any unit of work: the time left follows from the share that is done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, every: float = EVERY):
        from rich.console import Console

        self.console = Console(stderr=True)
        self._clock, self._every = clock, every
        self._start, self._share, self._what = clock(), 0.0, ""
        self._bar = self._task = None
        self._ended = threading.Event()

    def __enter__(self):
        if self.console.is_terminal:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.fields[state]}"), BarColumn(bar_width=20), TextColumn("{task.description}")
            # drawn seldom: drawing takes time from what is measured
            self._bar = Bar(*columns, console=self.console, transient=True, refresh_per_second=2)
            self._task = self._bar.add_task("", total=1.0, state="")
            self._bar.start()
        else:
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, total: float, what: str) -> None:
        self._share, self._what = (done / total if total else 0.0), what
        if self._bar is not None:
            self._bar.update(self._task, completed=self._share, description=what, state=self._state())

    def say(self, text: str) -> None:
        """Leaves a line above the bar; only a terminal shows it."""
        if self._bar is not None:
            self.console.print(text, markup=False, highlight=False)

    def line(self) -> str:
        """What is shown now: share, time left, what is being done."""
        return f"{self._state()}: {self._what}"

    def _state(self):
        elapsed = self._clock() - self._start
        left = f"about {duration(elapsed / self._share - elapsed)} left" if self._share > 0 else "just begun"
        return f"{self._share:.0%}, {left}"

    def _tell(self):
        while not self._ended.wait(self._every):
            print(self.line(), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "45 s", "3 min 20 s", "2 h 5 min"."""
    seconds = max(0, round(seconds))
    if seconds < 90:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 90:
        return f"{minutes} min {seconds} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
