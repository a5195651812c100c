"""Makes, checks and completes data in nuScenes' format.

    python train/tools/make_world.py --out FOLDER                  a generated world, with exact depth of every picture
    python train/tools/make_world.py --check FOLDER                whether such a world keeps the rules
    python train/tools/make_world.py --over ROOT --out FOLDER      a nuScenes root with its missing pictures drawn

A world opens with nuscenes-devkit as version v1.0-mini; its splits are world_train, world_val and world_all. The same
options give the same bytes, and scene n is the same however many scenes are made.
"""

import argparse
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rigfuse.train.command_line import Parser
from rigfuse.train.world import WorldSettings, check_world, draw_over, make_world

OF_WORLD, OF_OVER = ("seed", "scenes", "samples", "width", "sweeps"), ("samples", "only")


def build_parser() -> Parser:
    defaults = WorldSettings()
    parser = Parser(__doc__)
    parser.add_argument("--out", metavar="FOLDER", help="where to write; must not exist, or be empty")
    parser.add_argument("--check", metavar="FOLDER", help="check a generated world instead of making one")
    parser.add_argument("--over", metavar="ROOT", help="a nuScenes root whose missing pictures are to be drawn")
    parser.add_argument("--seed", type=int, help=f"the world to make (default {defaults.seed})")
    parser.add_argument("--scenes", type=int, help=f"how many drives (default {defaults.scenes})")
    parser.add_argument(
        "--samples",
        type=int,
        help=f"key frames in a scene, half a second apart (default {defaults.samples}); with --over, "
        "draw only the first so many of a scene (default all)",
    )
    parser.add_argument("--width", type=int, help=f"width of the 16:9 pictures in pixels (default {defaults.width})")
    parser.add_argument("--sweeps", type=int, help=f"LiDAR scans between key frames (default {defaults.sweeps})")
    parser.add_argument("--only", nargs="+", metavar="SCENE", help="with --over: draw these scenes only")
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
    for name in (others | {*OF_WORLD, *OF_OVER}) - set(allowed):
        if getattr(options, name) is not None:
            parser.error(f"--{name} means nothing for {mode}")
    if options.workers < 0:
        parser.error(f"--workers is {options.workers}; needs 0 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a world breaks rules, or 2 after a one-line message about the options."""
    options = parse(arguments)
    # Each process draws on its own; threads inside them would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        if options.check:
            return report(options.check)
        return make(options)
    except (OSError, ValueError) as error:
        print(f"make_world: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_world: stopped; nothing was written", file=sys.stderr)
        return 130


def make(options) -> int:
    start = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("pictures" if options.over else "samples", total=None)

    def progress(done, total):
        bar.start()  # not before: what is refused is refused in one line
        bar.update(task, completed=done, total=total)

    try:
        if options.over:
            draw_over(options.over, options.out, options.only, options.samples, options.workers, progress)
        else:
            given = {name: getattr(options, name) for name in OF_WORLD if getattr(options, name) is not None}
            make_world(options.out, WorldSettings(**given), options.workers, progress)
    finally:
        if bar.live.is_started:
            bar.stop()
    print(f"{options.out}: made in {time.monotonic() - start:.0f} s")
    return 0 if options.over else report(options.out)


def report(root: str) -> int:
    problems = check_world(root)
    print("\n".join(problems) if problems else f"{root}: keeps every rule")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
