"""What the commands share: every mistake is one line that names the nearest choice."""

import argparse
import difflib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SILENCE = 30.0  # seconds


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where one of `choices` is near, else the first of them, else nothing."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(choices[:12])}{', …' if len(choices) > 12 else ''}" if choices else ""


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
        while not done.wait(_SILENCE):
            print(f"{what} … {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    if active:
        threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        done.set()
