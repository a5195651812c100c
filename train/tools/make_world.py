"""Makes, checks and completes data in nuScenes' format.

    python train/tools/make_world.py --out FOLDER                  a generated world, with exact depth of every picture
    python train/tools/make_world.py --out FOLDER --seconds 20     longer drives: most boxes have the 6 s that follow
    python train/tools/make_world.py --out FOLDER --period 0.1     ten key frames a second instead of two
    python train/tools/make_world.py --out FOLDER --town parking   slow drives between perpendicular parking slots
    python train/tools/make_world.py --check FOLDER                whether such a world keeps the rules
    python train/tools/make_world.py --over ROOT --out FOLDER      a nuScenes root with its missing pictures drawn

A world is a folder in nuScenes' format, version v1.0-mini, that nuscenes-devkit opens as it is: six cameras, a LiDAR,
boxes of ten classes that drive, turn, wait and walk, and maps. Beyond nuScenes it has

    depth/                     the exact depth of every picture, 16-bit PNG, metres × 256
    maps/markings/             lines of nine types, signs, bumps, parking slots, solids; see train/world/records.py
    v1.0-mini/splits.json      world_train, world_val and world_all; every fifth scene, from the second on, validates
    summary.json               what is in it: settings, scenes, samples, boxes by category, map elements

Each scene has a town of its own, named in log.json, so nothing of validation is seen in training. The same options give
the same bytes, whatever --workers is, and scene n is the same however many scenes are made. With less than two scenes
there is nothing to validate on. Ctrl-C leaves nothing behind.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from rigfuse.train.command_line import Parser, console
from rigfuse.train.world import WorldSettings, check_world, describe, draw_over, make_world

OF_WORLD, OF_OVER = ("seed", "scenes", "samples", "seconds", "period", "width", "sweeps", "town"), ("samples", "only")
QUIET = 30.0  # seconds between two lines of progress where nobody watches


class Stopped(Exception):
    """A signal that asks the command to end."""


def build_parser() -> Parser:
    defaults = WorldSettings()
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to do")
    what.add_argument("--out", metavar="FOLDER", help="where to write; must not exist, or be empty")
    what.add_argument("--check", metavar="FOLDER", help="check a generated world instead of making one")
    what.add_argument("--over", metavar="ROOT", help="a nuScenes root whose missing pictures are to be drawn")
    how = parser.add_argument_group("a generated world")
    how.add_argument("--seed", type=int, help=f"which world to make (default {defaults.seed})")
    how.add_argument("--scenes", type=int, help=f"how many drives, each in its own town (default {defaults.scenes})")
    how.add_argument(
        "--samples",
        type=int,
        help=f"key frames in a scene (default {defaults.samples}); with --over, draw only the first so many of a scene",
    )
    how.add_argument("--seconds", type=float, help="how long a scene lasts, instead of --samples")
    how.add_argument("--period", type=float, help=f"seconds between key frames (default {defaults.period})")
    how.add_argument("--width", type=int, help=f"width of the 16:9 pictures in pixels (default {defaults.width})")
    how.add_argument("--sweeps", type=int, help=f"LiDAR scans between key frames (default {defaults.sweeps})")
    how.add_argument("--town", help=f"streets or parking (default {defaults.town})")
    over = parser.add_argument_group("over a nuScenes root")
    over.add_argument("--only", nargs="+", metavar="SCENE", help="draw these scenes only")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.check:
        mode, allowed = "--check", ()
    else:
        mode, allowed = ("--over", OF_OVER) if options.over else ("a generated world", OF_WORLD)
        if not options.out:
            parser.error("--out FOLDER is needed (or --check FOLDER); see --help")
    others = {"over", "out"} if options.check else set()
    for name in sorted((others | {*OF_WORLD, *OF_OVER}) - set(allowed)):
        if getattr(options, name) is not None:
            parser.error(f"--{name} means nothing for {mode}")
    if options.workers < 0:
        parser.error(f"--workers is {options.workers}; needs 0 or more")
    if options.seconds is not None and options.samples is not None:
        parser.error("--seconds and --samples say the same; give one of them")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a world breaks rules, or 2 after a one-line message about the options."""
    options = parse(arguments)
    # Each process draws on its own; threads inside them would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    was_there = _is_filled(options.out)
    earlier = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return report(options.check) if options.check else make(options)
    except (OSError, ValueError) as error:
        print(f"make_world: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        written = not was_there and _is_filled(options.out)
        where = "" if options.check else f"; {options.out} is {'whole, but not checked' if written else 'not written'}"
        print(f"make_world: stopped{where}", file=sys.stderr)
        return 128 + stop.args[0]
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _is_filled(folder: str | None) -> bool:
    return folder is not None and os.path.isdir(folder) and bool(os.listdir(folder))


def _stop(number, frame):
    """Ends the command once; a second signal must not disturb the tidying up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


class Meter:
    """Progress: a bar with the time that is left on a terminal, a line every half minute elsewhere."""

    def __init__(self, what: str):
        self.what, self.start, self.said = what, time.monotonic(), time.monotonic()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.console = console(stderr=True)
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task(what, total=None)

    def __call__(self, done: int, total: int):
        if self.console.is_terminal:
            self.bar.start()  # not before: what is refused is refused in one line
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.said >= QUIET or done == total:
            self.said = now
            left = (now - self.start) / done * (total - done)
            print(f"{done} of {total} {self.what}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self):
        if self.bar.live.is_started:
            self.bar.stop()


def make(options) -> int:
    meter = Meter("pictures" if options.over else "samples")
    try:
        if options.over:
            draw_over(options.over, options.out, options.only, options.samples, options.workers, meter)
        else:
            make_world(options.out, settings_of(options), options.workers, meter)
    finally:
        meter.close()
    print(f"{options.out}: made in {time.monotonic() - meter.start:.0f} s")
    if options.over:
        return 0
    summary = Path(options.out) / "summary.json"
    print(f"{describe(json.loads(summary.read_text()))}\nthe same figures: {summary}")
    return report(options.out)


def settings_of(options) -> WorldSettings:
    """The settings of a generated world that the options ask for.

    Raises:
        ValueError: a setting is out of its range.
    """
    given = {name: getattr(options, name) for name in OF_WORLD if getattr(options, name) is not None}
    seconds = given.pop("seconds", None)
    if seconds is not None:
        period = given.get("period", WorldSettings.period)
        if not (0 < seconds < 1e6 and period > 0):
            raise ValueError(f"seconds is {seconds}, period {period}; need more than 0")
        given["samples"] = int(seconds / period + 1e-9) + 1
    return WorldSettings(**given)


def report(root: str) -> int:
    problems = check_world(root)
    print("\n".join(problems) if problems else f"{root}: keeps every rule")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
