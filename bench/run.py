"""Measures V2 against V1, an operation against its peers, and more: results first, then time and memory.

Example: python bench/run.py --compare v1 v2 --quick

Every measurement is in FOLDER/results.jsonl as soon as it is made; Ctrl-C keeps them, in a report marked partial.

Exit status: 0 done; 1 a result was wrong, nothing could be measured, or (with --check-claims) a claim does not hold;
2 the command line is mistaken; 130 interrupted.
"""

import contextlib
import shlex
import signal
import sys
from pathlib import Path

from rigfuse.bench import facts, options, report, results
from rigfuse.bench.claims import Judged
from rigfuse.bench.profiling import profile_on_cpu, profile_on_cuda
from rigfuse.bench.results import CHECKS, Outcome
from rigfuse.bench.subject import Request
from rigfuse.bench.subjects import SUBJECTS
from rigfuse.train.claims import HOLDS
from rigfuse.train.command_line import INTERRUPTED, ProgressDisplay, TextTable, console, in_one_line, new_folder


@contextlib.contextmanager
def terminated_like_ctrl_c():
    """A SIGTERM, as a time limit or a scheduler sends it, ends the run as Ctrl-C does."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(request: Request, folder: Path, found: dict) -> tuple[Outcome, str]:
    """What was measured, each row written at once, and what ended it early, if anything did."""
    outcome, stopped = Outcome(), ""
    with ProgressDisplay() as progress, open(folder / results.FILE, "a") as file:

        def keep(row):
            results.append(file, row, found)
            if row.metric not in CHECKS:
                progress.say(report.row_line(row))

        outcome.on_row = keep
        try:
            request.subject.measure(request, outcome, progress.update)
        except KeyboardInterrupt:
            stopped = f"interrupted at {progress.line()}"
    return outcome, stopped


def tables(request: Request, outcome: Outcome, judged: list[Judged]) -> list[TextTable]:
    """What the terminal and report.md show."""
    shown = request.subject.tables(request, outcome)
    if judged:
        shown.insert(0, report.claims_table(judged))
    if request.earlier is not None:
        shown.append(report.against_table(outcome.rows, request.earlier[0], str(request.arguments.against)))
    if outcome.skipped:
        shown.append(report.skipped_table(outcome.skipped))
    return shown


def write_report(folder: Path, request: Request, command: str, outcome: Outcome, found: dict, notes: list, shown: list):
    from rigfuse.bench import plots  # what measures need not wait for matplotlib

    pictures = plots.draw(outcome, folder)
    pictures += request.subject.pictures(request, folder)
    lines = [f"# {request.plan.name}", "", headline(request, found), "", f"    {command}", ""]
    if request.earlier is not None:
        notes = [*notes, *report.against_warnings(found, request.earlier[1])]
    lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    lines += [table.markdown() for table in shown]
    lines += [f"![{name}]({name})\n" for name in pictures] + [request.subject.how_to_read]
    (folder / "report.md").write_text("\n".join(lines))


def headline(request: Request, found: dict) -> str:
    line, data = f"{facts.headline(found)} · {str(request.dtype).removeprefix('torch.')}", request.arguments.data
    if "data" not in request.subject.takes:
        return line
    return f"{line} · {f'geometry of {Path(data).name}' if data else 'built-in geometry'}"


def run(request: Request, command: str) -> int:
    if request.arguments.profile:
        return profile(request)
    request.out.mkdir(parents=True, exist_ok=True)
    found, screen = facts.collect(request.device), console()
    try:
        outcome, stopped = measure(request, request.out, found)
    except BaseException:
        forget_if_empty(request.out)
        raise
    if stopped and not outcome.rows:
        forget_if_empty(request.out)
        raise KeyboardInterrupt
    judged = request.subject.judge(request, outcome)
    shown = tables(request, outcome, judged)
    notes = [f"**Partial**: {stopped}"] if stopped else []
    notes += [note for note in (facts.warning(found),) if note]
    write_report(request.out, request, command, outcome, found, notes, shown)
    for line in (headline(request, found), *notes):
        screen.print(line)
    for table in shown:
        table.print(screen)
    screen.print(f"written to {request.out}")
    if stopped:
        return INTERRUPTED
    failed = bool(outcome.wrong) or all(row.metric in CHECKS for row in outcome.rows)
    refuted = any(claim.promised and claim.verdict != HOLDS for claim in judged)
    return int(failed or (request.arguments.check_claims and refuted))


def forget_if_empty(folder: Path) -> None:
    """Leaves nothing behind where nothing was measured."""
    path = folder / results.FILE
    if not path.exists() or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def profile(request: Request) -> int:
    workloads = request.subject.workloads(request)
    if request.device.type == "cuda":
        profile_on_cuda(workloads, request.dtype, request.modes)
        return 0
    with new_folder(request.out) as folder:
        profile_on_cpu(workloads, request.dtype, request.modes, folder)
    print(f"written to {request.out}")
    return 0


def show_list() -> int:
    screen = console()
    for subject in SUBJECTS.values():
        for table in subject.listing():
            table.print(screen)
    return 0


def main(argv: list[str] | None = None) -> int:
    with in_one_line("run.py"), terminated_like_ctrl_c():
        arguments = options.parse(__doc__, argv)
        if arguments.list:
            return show_list()
        command = shlex.join(["python", "bench/run.py", *(sys.argv[1:] if argv is None else argv)])
        return run(options.resolve(arguments), command)


if __name__ == "__main__":
    sys.exit(main())
