"""The command line: one option for each subject, its own options, and those that several understand."""

import time
from pathlib import Path

import torch

from ..modules.rig import NUSCENES_CAMERAS
from ..train.command_line import Parser, UsageError, check_new, choose
from ..train.data import Drive, open_drives
from .measure import Effort
from .results import ResultsError, read
from .subject import Request, modes_of, with_mode
from .subjects import SUBJECTS

DTYPES = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
DEVICES = ("cpu", "cuda")
QUICK, THOROUGH = Effort(seconds=1.0, least=3), Effort(seconds=2.5, least=3)
_EXAMPLE = "for example --compare v1 v2"


def make_parser(doc: str) -> tuple[Parser, dict[str, str]]:
    """The parser, and for each option that belongs to one subject (by its name there) the subject's option."""
    parser, owners = Parser(doc, prog="run.py"), {}
    what = parser.add_argument_group("what to measure: one of")
    for subject in SUBJECTS.values():
        what.add_argument(f"--{subject.option}", help=subject.about, **subject.settings)
    what.add_argument("--list", action="store_true", help="show everything that can be chosen")
    for subject in SUBJECTS.values():
        group = parser.add_argument_group(f"with --{subject.option}")

        def add(name, owner=subject.option, group=group, **settings):
            owners[group.add_argument(name, **settings).dest] = owner

        subject.add_options(add)
    how = parser.add_argument_group("how")
    how.add_argument("--case", nargs="+", metavar="CASE", help="only these cases (default: all that suit the device)")
    how.add_argument("--quick", action="store_true", help="fewer cases and repetitions: about a minute on two cores")
    how.add_argument("--mode", metavar="MODE", help="fwd, fwd-bwd or, in the scope step, step (default: all)")
    how.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is one)")
    how.add_argument(
        "--dtype", metavar="DTYPE", help="float32, float16, bfloat16 (default: float32, on a GPU bfloat16)"
    )
    how.add_argument("--data", metavar="ROOT", help="geometry of this nuScenes root (default: the built-in drives)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: runs/bench/<time>-<subject>)")
    out.add_argument("--against", type=Path, metavar="FOLDER", help="compare with an earlier run's folder")
    out.add_argument(
        "--check-claims",
        action="store_true",
        help="exit with status 1 unless every promised claim holds (default: only report)",
    )
    out.add_argument("--profile", action="store_true", help="run under named ranges instead of timing")
    return parser, owners


def parse(doc: str, argv: list[str] | None):
    parser, owners = make_parser(doc)
    arguments = parser.parse_args(argv)
    arguments.owners = {name: owner for name, owner in owners.items() if getattr(arguments, name) is not None}
    return arguments


def resolve(arguments) -> Request:
    """Checks everything before anything runs; raises UsageError."""
    given = [option for option in SUBJECTS if getattr(arguments, _dest(option)) not in (None, False)]
    if len(given) != 1:
        raise UsageError(f"choose one of {', '.join(f'--{option}' for option in (*SUBJECTS, 'list'))}; {_EXAMPLE}")
    subject = SUBJECTS[given[0]]
    _refuse_what_means_nothing(subject, arguments)
    modes, device = modes_of(arguments.mode), _device(arguments.device)
    plan = with_mode(subject.plan(arguments, device), arguments.mode)
    dtype = choose("dtype", arguments.dtype or subject.default_dtype(device), DTYPES)
    out = arguments.out or Path("runs", "bench", f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.name}")
    return Request(
        subject=subject,
        plan=plan,
        arguments=arguments,
        modes=modes,
        device=device,
        dtype=DTYPES[dtype],
        effort=QUICK if arguments.quick else THOROUGH,
        drives=_drives(arguments.data, subject),
        out=check_new("--out", out),
        earlier=_earlier(arguments.against),
    )


def _dest(option):
    return option.replace("-", "_")


def _refuse_what_means_nothing(subject, arguments):
    for name, owner in arguments.owners.items():
        if owner != subject.option:
            raise UsageError(f"--{name} goes with --{owner}, not with --{subject.option}")
    for name in ("case", "quick", "mode", "device", "dtype", "data", "profile"):
        if getattr(arguments, name) and name not in subject.takes:
            raise UsageError(f"--{name} means nothing with --{subject.option}")
    if arguments.profile and (arguments.check_claims or arguments.against):
        raise UsageError("--profile measures nothing; leave --check-claims and --against out")


def _device(name):
    name = choose("device", name or ("cuda" if torch.cuda.is_available() else "cpu"), DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; choose cpu")
    return torch.device(name)


def _drives(data, subject) -> list[Drive]:
    """The drives, after a look at a moment of each: a rig that does not fit is refused before anything is measured."""
    try:
        drives = open_drives(data)
        names = [drive[0].rig.names for drive in drives if len(drive)]
    except (OSError, ValueError, ImportError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UsageError(f"--data: {what}") from error
    if not names:
        raise UsageError(f"--data: {data} has no scene")
    needed = names[0] if subject.any_rig else NUSCENES_CAMERAS
    other = next((cameras for cameras in names if cameras != needed), None)
    if other is not None:
        raise UsageError(f"--data: a scene has the cameras {', '.join(other)}; needs {', '.join(needed)}")
    return drives


def _earlier(folder):
    try:
        return None if folder is None else read(folder)
    except ResultsError as error:
        raise UsageError(f"--against: {error}") from error
