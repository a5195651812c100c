"""The command line: every mistake is one line that names the nearest choice."""

import argparse
import difflib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..train.data import Drive, open_drives
from .cases import CASES, default_cases, suits
from .results import ResultsError, Row, read
from .subjects import compare
from .subjects import detector_step as detector
from .subjects.operations import OPERATIONS
from .subjects.operations.operation import PLAIN, SCOPE
from .workload import MODE_NAMES, STEP

DTYPES = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
DEVICES = ("cpu", "cuda")
QUICK = dict(seconds=1.0, least_rounds=3)
THOROUGH = dict(seconds=3.0, least_rounds=5)


class UsageError(Exception):
    """The command line asks for something that there is not. One line."""


@dataclass(frozen=True)
class Request:
    """What to run. `earlier` holds the rows and facts of `--against`."""

    subject: str
    providers: tuple[str, ...]
    places: tuple[tuple[str, str], ...]  # scope and case, those of a case together
    modes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    effort: dict[str, float]
    drives: list[Drive]
    data: str | None
    out: Path
    against: Path | None
    earlier: tuple[list[Row], dict] | None
    check_claims: bool
    profile: bool

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case for _, case in self.places))

    @property
    def baseline(self) -> str:
        return self.providers[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.py",
        allow_abbrev=False,
        description="Measures V2 against V1, or one operation against its peers: results first, then time and memory.",
        epilog="Example: python bench/run.py --compare v1 v2 --quick",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--compare", nargs="+", metavar="PROVIDER", help="compare these; the first is the baseline")
    what.add_argument("--op", metavar="NAME", help="measure one operation against its peers")
    what.add_argument("--detector", action="store_true", help="a training step of it, branches frozen or not")
    what.add_argument("--list", action="store_true", help="show every provider, scope, case and operation")
    how = parser.add_argument_group("how")
    how.add_argument("--scope", nargs="+", metavar="SCOPE", help="with --compare (default: all of them)")
    how.add_argument("--case", nargs="+", metavar="CASE", help="only these cases (default: all that suit the device)")
    how.add_argument("--quick", action="store_true", help="fewer cases and repetitions: about a minute on two cores")
    how.add_argument("--mode", metavar="MODE", help="fwd, fwd-bwd or, in the scope step, step (default: all)")
    how.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    how.add_argument(
        "--dtype", metavar="DTYPE", help="float32, float16, bfloat16 (default: float32, on a GPU bfloat16)"
    )
    how.add_argument("--data", metavar="ROOT", help="geometry of this nuScenes root (default: the built-in drives)")
    what_comes_out = parser.add_argument_group("what comes out")
    what_comes_out.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/bench/<time>-<subject>")
    what_comes_out.add_argument("--against", type=Path, metavar="FOLDER", help="compare with an earlier run's folder")
    what_comes_out.add_argument(
        "--check-claims", action="store_true", help="exit with status 1 unless every claim holds (default: only report)"
    )
    what_comes_out.add_argument(
        "--profile", action="store_true", help="run each provider under named ranges instead of timing it"
    )
    return parser


def choose(kind: str, given: str, choices: Iterable[str]) -> str:
    """`given` if it is one of `choices`; else a UsageError with the nearest one and all of them."""
    choices = list(choices)
    if given in choices:
        return given
    nearest = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    hint = f", did you mean {nearest[0]}?" if nearest else ";"
    raise UsageError(f"no {kind} {given!r}{hint} choose from {', '.join(choices)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        choose("option", unknown[0].split("=")[0], options)
    return arguments


def resolve(arguments: argparse.Namespace) -> Request:
    """Checks everything before anything runs."""
    given = [name for name in _SUBJECTS if getattr(arguments, name)]
    if len(given) != 1:
        choices = "--compare PROVIDER …, --op NAME, --list, --detector"
        raise UsageError(f"choose one of {choices}; for example --compare v1 v2")
    device = _device(arguments.device)
    subject, providers, places = _SUBJECTS[given[0]](arguments, device)
    if arguments.mode:
        mode = choose("mode", arguments.mode, MODE_NAMES)
        places = [place for place in places if (place[0] == "step") == (mode == STEP)]
        if not places:
            raise UsageError(f"--mode {mode}: the scope step has the mode step and no other; nothing else has it")
    if arguments.check_claims and subject != detector.SUBJECT and not {"v1", "v2"} <= set(providers):
        raise UsageError("--check-claims needs --compare v1 v2")
    if arguments.profile and (arguments.check_claims or arguments.against):
        raise UsageError("--profile measures nothing; leave --check-claims and --against out")
    dtype = choose("dtype", arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"), DTYPES)
    return Request(
        subject=subject,
        providers=providers,
        places=tuple(dict.fromkeys(places)),
        modes=(mode,) if arguments.mode else tuple(MODE_NAMES),
        device=device,
        dtype=DTYPES[dtype],
        effort=QUICK if arguments.quick else THOROUGH,
        drives=_drives(arguments.data),
        data=arguments.data,
        out=_out(arguments.out, subject),
        against=arguments.against,
        earlier=_earlier(arguments.against),
        check_claims=arguments.check_claims,
        profile=arguments.profile,
    )


def _compared(arguments, device):
    """Subject, providers, and scope and case of everything to compare, case by case."""
    providers = tuple(choose("provider", name, compare.PROVIDERS) for name in dict.fromkeys(arguments.compare))
    named = {choose("scope", name, compare.SCOPES) for name in arguments.scope or ()}
    scopes = [name for name in compare.SCOPES if not named or name in named]
    cases = {scope: default_cases(scope, arguments.quick, device) for scope in scopes}
    if arguments.case:
        given = [choose("case", name, CASES) for name in arguments.case]
        cases = {scope: [c for c in given if scope in named or suits(scope, CASES[c], device)] for scope in scopes}
    places = [(scope, case) for scope in scopes for case in cases[scope]]
    order = list(dict.fromkeys(arguments.case or CASES))
    return compare.SUBJECT, providers, sorted(places, key=lambda place: order.index(place[1]))


def _operated(arguments, device):
    subject = choose("operation", arguments.op, OPERATIONS)
    operation = OPERATIONS[subject]
    _refuse(("scope", "data"), arguments, "--op")
    providers = (PLAIN, *(name for name in operation.providers if name != PLAIN))
    flags = {name: (name in operation.quick, name in operation.heavy, name != "tiny") for name in operation.cases}
    cases = [name for name, flag in flags.items() if _belongs(*flag, arguments, device)]
    return subject, providers, [(SCOPE, choose("case", name, operation.cases)) for name in arguments.case or cases]


def _detected(arguments, device):
    _refuse(("scope",), arguments, "--detector")
    cases = arguments.case or detector.default_cases(arguments.quick, device)
    places = [(detector.SCOPE, choose("case", name, detector.CASES)) for name in cases]
    return detector.SUBJECT, tuple(detector.PROVIDERS), places


_SUBJECTS = dict(compare=_compared, op=_operated, detector=_detected)


def _refuse(options, arguments, subject):
    for option in options:
        if getattr(arguments, option):
            raise UsageError(f"--{option} goes with --compare, not with {subject}")


def _belongs(quick, heavy, default, arguments, device):
    return quick if arguments.quick else default and (not heavy or device.type == "cuda")


def _device(name):
    name = choose("device", name or ("cuda" if torch.cuda.is_available() else "cpu"), DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; choose cpu")
    return torch.device(name)


def _drives(data):
    try:
        return open_drives(data)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--data: {error}") from error


def _out(out, subject):
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: exists already; choose a new folder")
        return out
    return Path("runs", "bench", f"{time.strftime('%Y%m%d-%H%M%S')}-{subject}")


def _earlier(folder):
    try:
        return None if folder is None else read(folder)
    except ResultsError as error:
        raise UsageError(f"--against: {error}") from error
