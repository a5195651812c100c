"""Runs bench/run.py several times in one process, for starting one takes longer than measuring does.

    python bench/in_turn.py COMMANDS.json END STATUSES

COMMANDS.json has a list of lists of run.py's arguments. Each command gets an equal part of the time that is left until
END (seconds since the epoch) and is then ended as by Ctrl-C, so that it keeps what it measured. STATUSES gets a line
for each with its exit status. The first that fails ends all, for it may have left a broken device behind.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rigfuse.bench import run
from rigfuse.train.command_line import INTERRUPTED

LEAST = 5.0  # seconds with which it is worth to begin


def run_in_turn(commands: Sequence[Sequence[str]], seconds: float, tell: Callable[[int], None]) -> None:
    """Runs the commands; `tell` is called with the exit status of each that was begun."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before, end = signal.signal(signal.SIGALRM, interrupt), time.monotonic() + seconds
    try:
        for number, command in enumerate(commands):
            left = (end - time.monotonic()) / (len(commands) - number)
            if left < LEAST:
                return
            signal.setitimer(signal.ITIMER_REAL, left)
            try:
                status = run.main(list(command))
            except SystemExit as ended:
                status = ended.code
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                status = 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            tell(status)
            if status not in (0, INTERRUPTED):
                return
    finally:
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str]) -> int:
    commands, end, statuses = arguments
    seconds = float(end) - time.time()
    with open(statuses, "a") as file:
        run_in_turn(
            json.loads(Path(commands).read_text()), seconds, lambda status: print(status, file=file, flush=True)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
