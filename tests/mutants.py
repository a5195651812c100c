"""Plants faults one at a time into a copy of the code and says which of them the tests do not see.

    python tests/mutants.py                     a sample of eight faults of tests/mutants.toml
    python tests/mutants.py --sample 100        all of them
    python tests/mutants.py --only "teacher"    those whose description has these words

A fault that lives shows a property that no test holds. The code without faults has to pass its tests first.
Ends with 0 if every fault was caught, 1 if one lived.
"""

import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = tomllib.loads((Path(__file__).with_suffix(".toml")).read_text())["fault"]


def copy_of_the_code(folder: Path) -> Path:
    """The files of the checkout below a folder, to import as rigfuse."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    copy = folder / "rigfuse"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def passes(copy: Path, tests: str) -> bool:
    """Whether the tests pass in the copy."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    data = os.environ.get("RIGFUSE_TEST_DATA") or str(ROOT.parent / "shared" / "data")
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "RIGFUSE_TEST_DATA": data}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode > 1:  # not a test that failed
        sys.exit(f"mutants: the tests of {tests} do not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


def lives(copy: Path, fault: dict) -> bool:
    """Whether the tests pass with the fault in the code."""
    path = copy / fault["file"]
    sound = path.read_text()
    path.write_text(sound.replace(fault["text"], fault["instead"]))
    try:
        return passes(copy, fault["tests"])
    finally:
        path.write_text(sound)


def main() -> int:
    from rigfuse.train.command_line import Parser

    parser = Parser(__doc__)
    parser.add_argument("--sample", type=int, default=8, help="how many faults (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default 0)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only faults whose description has these words")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault["what"]]
    faults = random.Random(options.seed).sample(faults, min(options.sample, len(faults)))
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_code(Path(folder))
        for tests in sorted({fault["tests"] for fault in faults}):
            if not passes(copy, tests):
                sys.exit(f"mutants: {tests} fails without any fault")
        for number, fault in enumerate(faults, 1):
            start = time.monotonic()
            verdict = "LIVES" if lives(copy, fault) else "caught"
            alive += [fault["what"]] if verdict == "LIVES" else []
            print(
                f"{number:>3} of {len(faults)}  {verdict}  {fault['what']} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    print(f"{len(faults) - len(alive)} of {len(faults)} faults caught")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
